"""Kinds of decoder layers, and a small model that has one of each: what layers compute is shown there.

The small model (:mod:`halfbyte.fast.stand_in`) has the class, the configuration and the layer's place in it, but few
heads and random weights. So a proof costs the same for every size, and holds where there are no weights (a plan) or
only shards of them (FSDP2, ZeRO-3).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.fast import arguments, stand_in
from halfbyte.fast.parts import Uncovered

# What FSDP2 and parametrizations of packed experts put before the name of a class.
_WRAPPED = ("FSDP", "Parametrized")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Call:
    """One call of a module on ``hidden``; an ``attention`` returns its weights too, which eager computes."""

    module: Any
    hidden: Tensor
    kwargs: Mapping[str, Any]
    attention: bool = False


def kind(module: nn.Module) -> Any:
    """What layers that compute alike have in common: their modules, and the numbers and names that these hold."""
    return tuple((name, cls, *_facts(each)) for name, cls, each in _modules(module))


def outline(module: nn.Module) -> Any:
    """What a layer and a small one in its place have in common: modules, switches and names, but not sizes."""

    def said(each: nn.Module) -> list[tuple[str, Any]]:
        return [
            (key, value) for key, value in _facts(each) if value is True or not isinstance(value, float | int)
        ]

    return [(name, cls, *said(each)) for name, cls, each in _modules(module)]


def on_small(
    owner: Any, name: str, indices: Sequence[int], show: Callable[[Any, list[nn.Module]], _T | str]
) -> _T | str:
    """Return what ``show`` finds in a small model like ``owner`` and its layers at ``indices``; or why there is none.

    ``name`` is what ``owner`` calls its layers. What fails in the smallest model is tried in larger ones.
    """
    layers = getattr(owner, name)
    cut, all_ = max(indices) + 1, len(layers)
    reasons = []
    for count, narrow in ((cut, True), (all_, True), (cut, False), (all_, False)):
        try:
            small = stand_in.of_layers(owner, count, narrow=narrow)
            those = [getattr(small, name)[index] for index in indices]
            if [outline(each) for each in those] == [outline(layers[index]) for index in indices]:
                return show(small, those)
            reasons.append("its layers are others")
        except Exception as error:  # whatever a model raises, its layers run their own forward
            reasons.append(f"{type(error).__name__}: {error}")
    return f"no small {type(owner).__name__} shows what layers compute ({reasons[0]})"


def kept(modules: list[nn.Module], run: Callable[[], Any]) -> list[Call]:
    """Return the first call of each of ``modules`` while ``run`` runs."""
    found: dict[nn.Module, Call] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        try:
            named = arguments.named(module, args[1:], kwargs)
        except Uncovered:
            return
        if not isinstance(hidden, Tensor):
            return
        found.setdefault(
            module, Call(module, hidden, {n: v for n, v in named.items() if n != "hidden_states"})
        )

    hooks = [each.register_forward_pre_hook(keep, with_kwargs=True) for each in modules]
    try:
        run()
    finally:
        for each in hooks:
            each.remove()
    return [found[each] for each in modules if each in found]


def _modules(module: Any, name: str = "") -> Iterator[tuple[str, Any, nn.Module]]:
    """The modules in a layer by name and class, adapters apart; linears are those with a bias and those without."""
    while isinstance(module, LoraLayer):
        module = module.base_layer
    if isinstance(module, nn.Linear | Conv1D):
        yield name, "linear" if module.bias is None else "linear with bias", nn.Identity()
        return
    yield name, next(c for c in type(module).__mro__ if not c.__name__.startswith(_WRAPPED)), module
    for child, each in module.named_children():
        if child != "parametrizations":
            yield from _modules(each, f"{name}.{child}")


def _facts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        plain = value is None or isinstance(value, bool | int | float | str)
        if (
            plain
            and not name.startswith("_")
            and name not in ("layer_idx", "training", "gradient_checkpointing")
        ):
            yield name, value
