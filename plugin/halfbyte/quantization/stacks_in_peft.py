"""What PEFT sees of packed stacks of experts when it puts an adapter on a model."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from halfbyte.quantization import experts

_OWN = BaseTuner._inject_parameters


@functools.cache
def install() -> None:
    """Show packed stacks whole to PEFT for as long as it looks for ``target_parameters``, in this process.

    PEFT 0.21 finds a parameter that is parametrized by its module's full path alone, and not below one of its own
    wrappers: it would adapt no experts for a reference, or in another order than it loads them in over a 16-bit base.
    """
    BaseTuner._inject_parameters = _inject


@functools.wraps(_OWN)
def _inject(self: BaseTuner, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    with shown_whole(model):
        return _OWN(self, peft_config, model, *args, **kwargs)


@contextmanager
def shown_whole(model: nn.Module) -> Iterator[None]:
    """Have the packed stacks of ``model`` be parameters of their whole shape in this block, which may not read them."""
    hidden: list[tuple[nn.Module, type[nn.Module], Any]] = []
    for _, module, _ in list(experts.modules(model)):
        lists: Any = getattr(module, "parametrizations", None)
        if lists is None:
            continue
        hidden.append((module, type(module), lists))
        del module.parametrizations
        module.__class__ = type(module).__mro__[1]
        for name, each in lists.items():
            state = each.original.quant_state
            one = torch.zeros((), dtype=state.dtype, device=each.original.device)
            setattr(module, name, nn.Parameter(one.expand(tuple(state.shape)), requires_grad=False))
    try:
        yield
    finally:
        for module, cls, lists in hidden:
            for name in lists:
                delattr(module, name)
            module.parametrizations = lists
            module.__class__ = cls
