"""transformers' own torch functions in the place of kernels that compute on a GPU alone.

Where causal_conv1d, mamba_ssm or fla is installed, state layers call its kernels, on every device
(transformers/integrations/hub_kernels.py, 5.24). What a model computes is shown on the CPU.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_WRAPPING = "transformers.integrations.hub_kernels"


@contextlib.contextmanager
def torch_functions(model: nn.Module) -> Iterator[None]:
    """Let the modules of ``model`` call the torch functions that kernels are called in the place of."""
    classes = {cls for each in model.modules() for cls in type(each).__mro__}
    modules = {cls.__module__ for cls in classes if not cls.__module__.startswith("torch.")}
    kernels = [
        (vars(sys.modules[name]), called, value)
        for name in modules
        for called, value in list(vars(sys.modules[name]).items())
        if _calls_a_kernel(value)
    ]
    for names, called, value in kernels:
        names[called] = value.__wrapped__
    try:
        yield
    finally:
        for names, called, value in kernels:
            names[called] = value


def _calls_a_kernel(value: Any) -> bool:
    return (
        inspect.isfunction(value)
        and value.__globals__.get("__name__") == _WRAPPING
        and hasattr(value, "__wrapped__")
    )
