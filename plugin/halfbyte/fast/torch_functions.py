"""transformers' own torch functions in the place of kernels that compute on a GPU alone.

Where causal_conv1d, mamba_ssm or fla is installed, state layers call its kernels, on every device
(transformers/integrations/hub_kernels.py, 5.24). What a model computes is shown on the CPU.
"""

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_PACKAGES = ("causal_conv1d", "fla", "mamba_ssm")
_WRAPPING = "transformers.integrations.hub_kernels"


@contextlib.contextmanager
def torch_functions(model: nn.Module) -> Iterator[None]:
    """Let the modules of ``model`` call the torch functions that kernels are called in the place of."""
    found = list(_kernels(model))
    for names, called, value in found:
        names[called] = value.__wrapped__
    try:
        yield
    finally:
        for names, called, value in found:
            names[called] = value


def calls_kernels(model: nn.Module) -> bool:
    """Whether ``model`` may call kernels of a package that is installed, and so computes on a GPU alone."""
    return any(_kernels(model)) and any(importlib.util.find_spec(package) for package in _PACKAGES)


def _kernels(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    classes = {cls for each in model.modules() for cls in type(each).__mro__}
    for module in {cls.__module__ for cls in classes if not cls.__module__.startswith("torch.")}:
        names = vars(sys.modules[module])
        yield from ((names, called, value) for called, value in list(names.items()) if _calls_a_kernel(value))


def _calls_a_kernel(value: Any) -> bool:
    return (
        inspect.isfunction(value)
        and value.__globals__.get("__name__") == _WRAPPING
        and hasattr(value, "__wrapped__")
    )
