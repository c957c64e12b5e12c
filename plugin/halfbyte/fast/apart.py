"""Decoder layers that run their own forward around fused parts: all that these keep may stay for the backward.

Transformers recomputes such a layer in the backward, experts and all. Where nothing in it is unknown (attention, MLPs
and experts fused, else norms and a router), what it would keep is known too, and the highest save level of
:mod:`halfbyte.fast.layer_call` keeps it instead.
"""

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from halfbyte.fast import experts, layer, reading
from halfbyte.fast.layer_call import LEVELS
from halfbyte.quantization.experts import shapes as shapes_of


class ApartForward:
    """The ``forward`` of such a layer at save ``level``: its class's own, not recomputed at the highest."""

    def __init__(self, module: nn.Module, level: int) -> None:
        self.module, self.level = module, level

    def keeps(self, level: int | None = None) -> bool:
        """Whether all of a forward stays for the backward at ``level``, by default its own."""
        return (self.level if level is None else level) == LEVELS[-1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns."""
        forward: Any = type(self.module).forward
        if self.keeps():
            forward = forward.__wrapped__  # what transformers puts its activation checkpointing around
        return forward(self.module, *args, **kwargs)


def take(module: nn.Module, level: int) -> bool:
    """Give the layer ``module``, whose parts are fused already, a save level; return whether it can have one."""
    if not _is_described(module):
        return False
    module.forward = ApartForward(module, level)
    return True


def leave(module: nn.Module) -> None:
    """Undo :func:`take`."""
    if isinstance(module.forward, ApartForward):
        del module.forward


def forwards(model: nn.Module) -> list[ApartForward]:
    """Return the forwards of the layers of ``model`` that have a save level without being fused whole."""
    return [each.forward for each in model.modules() if isinstance(each.forward, ApartForward)]


def outside(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules in ``module``, itself among them, that are not in fused attention, MLPs or experts.

    A linear map is one module, with its adapters.
    """
    yield module
    if isinstance(module, LoraLayer):
        return
    for child in module.children():
        if not layer.is_fused(child) and not experts.is_fused(child):
            yield from outside(child)


def _is_described(module: nn.Module) -> bool:
    """Whether ``module`` is fused attention, MLPs and experts, norms, vectors, and at most a row for each expert."""
    shapes = [shape for _, _, held in experts.within(module) for shape in shapes_of(held).values()]
    routed = max((shape[0] for shape in shapes), default=0)
    return any(layer.is_fused(each) and reading.is_attention(each) for each in module.modules()) and all(
        _rows(each) <= routed for each in outside(module)
    )


def _rows(module: Any) -> int:
    """The most rows of a matrix that ``module`` itself has; 0 where it has vectors alone."""
    if isinstance(module, LoraLayer | nn.Linear):  # which may be packed, as bytes in one column
        return int(module.out_features)
    return max((len(each) for each in module.parameters(recurse=False) if each.dim() > 1), default=0)
