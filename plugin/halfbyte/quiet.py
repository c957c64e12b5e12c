"""Upstream's lines that are not ours to print."""

import logging


def advertisements() -> None:
    """Drop bitsandbytes' line about an optional kernel package, printed when it is imported; halfbyte uses no such."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_no_kernel_package)


def _no_kernel_package(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward from kernels-community" not in str(record.msg)
