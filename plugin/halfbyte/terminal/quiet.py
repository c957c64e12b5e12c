"""Upstream's lines that are not ours to print."""

import logging
import warnings

_MOST_LINES = 10


def advertisements() -> None:
    """Drop bitsandbytes' line about an optional kernel package, printed when it is imported; halfbyte uses no such."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_no_kernel_package)


def long_reports() -> None:
    """Cut transformers' report on a checkpoint, which has a line for each weight that is not the model's."""
    logging.getLogger("transformers.modeling_utils").addFilter(_cut)


def experimental() -> None:
    """Drop TRL's notice that its experimental trainers may change: a run of such a recipe says it itself."""
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")


def _cut(record: logging.LogRecord) -> bool:
    lines = record.getMessage().splitlines()
    if len(lines) > _MOST_LINES:
        more = f"... {len(lines) - _MOST_LINES + 1:,} lines more"
        record.msg, record.args = "\n".join([*lines[: _MOST_LINES - 1], more]), ()
    return True


def _no_kernel_package(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward from kernels-community" not in str(record.msg)
