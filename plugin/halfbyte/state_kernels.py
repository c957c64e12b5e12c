"""Kernels of other packages that state layers call, and where transformers' own torch functions take their place.

Where causal_conv1d, mamba_ssm or fla is installed, transformers calls its kernels on every device
(integrations/hub_kernels.py, 5.24), and they compute on a GPU alone. What a model computes is shown on the CPU.
"""

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

_PACKAGES = ("causal_conv1d", "fla", "mamba_ssm")
_WRAPPING = "transformers.integrations.hub_kernels"
# In training these are handed the weights of a Mamba's linear maps. The torch function returns nothing, and the layer
# goes on map by map, with the other kernels.
_READING_WEIGHTS = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")


class _Kernel(NamedTuple):
    """What a modeling module calls ``name``: a kernel, or the torch function in its place."""

    names: dict[str, Any]
    name: str
    value: Any


@contextlib.contextmanager
def torch_functions(model: nn.Module) -> Iterator[None]:
    """Let the modules of ``model`` call the torch functions that kernels are called in the place of."""
    found = _kernels(model)
    _leave_out(found)
    try:
        yield
    finally:
        for names, name, value in found:
            names[name] = value


def leave_out_reading_weights(model: nn.Module) -> None:
    """Leave out, for good, the kernels that read the weights of linear maps of ``model``, which are packed."""
    _leave_out([each for each in _kernels(model) if each.name in _READING_WEIGHTS])


def calls_kernels(model: nn.Module) -> bool:
    """Whether ``model`` may call kernels of a package that is installed, and so computes on a GPU alone."""
    return bool(_kernels(model)) and any(importlib.util.find_spec(package) for package in _PACKAGES)


def _leave_out(kernels: list[_Kernel]) -> None:
    for names, name, value in kernels:
        names[name] = value.__wrapped__


def _kernels(model: nn.Module) -> list[_Kernel]:
    classes = {cls for each in model.modules() for cls in type(each).__mro__}
    modules = {cls.__module__ for cls in classes if not cls.__module__.startswith("torch.")}
    return [
        _Kernel(vars(sys.modules[module]), name, value)
        for module in modules
        for name, value in vars(sys.modules[module]).items()
        if _calls_a_kernel(value)
    ]


def _calls_a_kernel(value: Any) -> bool:
    return (
        inspect.isfunction(value)
        and value.__globals__.get("__name__") == _WRAPPING
        and hasattr(value, "__wrapped__")
    )
