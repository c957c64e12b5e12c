"""State layers whose kernels would be handed packed weights: their linear maps are called as modules instead.

In training transformers hands the weights of a Mamba's linear maps to one kernel, where mamba_ssm is installed. Its own
function in the place of that returns nothing, and it goes on map by map, with the other kernels.
"""

import sys
from typing import Any

import bitsandbytes as bnb
from torch import nn

_READING_WEIGHTS = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
_PACKED = bnb.nn.Linear4bit | bnb.nn.Linear8bitLt


def leave_out_fused(model: nn.Module) -> None:
    """Leave out the kernels of ``model`` that read the weights of linear maps, if any of these is packed."""
    if not any(isinstance(each, _PACKED) for each in model.modules()):
        return
    for module in {type(each).__module__ for each in model.modules()}:
        names: dict[str, Any] = vars(sys.modules[module])
        for name in _READING_WEIGHTS:
            if hasattr(names.get(name), "__wrapped__"):
                names[name] = names[name].__wrapped__
