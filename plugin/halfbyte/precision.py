"""The dtype of a run: what was given, what a checkpoint recorded, or what is best for the base on this device."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from halfbyte import distributed, quantization
from halfbyte.distributed import zero3


def settle(
    options: Any,
    given: Collection[str],
    device: torch.device,
    base: tuple[str, str],
    recorded: Mapping[str, Any],
    values: dict[str, Any],
) -> tuple[str, str]:
    """Make ``dtype``, ``bf16`` and ``fp16`` agree in ``values``, and return the dtype and a line about it.

    What was given rules, then what a checkpoint ``recorded``; what is best for ``base``, its name and revision, on
    ``device`` fills in.
    """
    if "dtype" in recorded and not {"dtype", "bf16", "fp16"} & set(given):
        values.update({key: recorded[key] for key in ("dtype", "bf16", "fp16")})
        return recorded["dtype"], f"compute dtype: {recorded['dtype']} (as in the checkpoint)"
    bf16, fp16 = ("bf16" in given and options["bf16"]), ("fp16" in given and options["fp16"])
    if "dtype" in given and options["dtype"] not in (None, "auto"):
        dtype, why = options["dtype"], "as given"
        autocast = "bfloat16" if bf16 else "float16" if fp16 else dtype
        if autocast != dtype:
            why += f"; the base computes in {autocast} under autocast, as the arguments say"
    elif bf16:
        dtype, why = "bfloat16", "from bf16: true"
    elif fp16:
        dtype, why = "float16", "from fp16: true"
    elif "bf16" in given and options["bf16"] is False:
        dtype, why = "float32", "from bf16: false"
        best = _best(device, base)
        why += "" if best == dtype else f"; {best} would be faster on this {device.type}"
    else:
        dtype, why = _best(device, base), f"chosen for this {device.type}"
    values["dtype"] = dtype
    sixteen = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16" and device.type == "cuda"}
    if zero3.requested():
        sixteen = dict.fromkeys(sixteen, False)  # DeepSpeed would cast the float32 adapters
    if "bf16" not in given and "fp16" not in given:
        values.update(sixteen)
    elif "bf16" not in given:
        values["bf16"] = False if fp16 else sixteen["bf16"]
    distributed.refuse_precision(dtype, why)
    return dtype, f"compute dtype: {dtype} ({why})"


def _best(device: torch.device, base: tuple[str, str]) -> str:
    """The dtype that ``device`` is fast and safe in; rank 0 decides for all."""
    shape = quantization.shape_of(*base) if device.type == "cpu" else None
    return str(distributed.agree(quantization.choose_compute_dtype(device, shape))).removeprefix("torch.")
