"""The members of a module that has the parts of a layer: children, linear maps and norms, by their names."""

from typing import Any

from torch import nn

from halfbyte.fast.adapted import base
from halfbyte.fast.norm import Norm, NormForm
from halfbyte.fast.parts import Form, Linears, Uncovered

_EPSILONS = ("variance_epsilon", "eps", "epsilon")


def part(module: Any, names: tuple[str, ...]) -> Any:
    """The first child of ``module`` that has one of these ``names``."""
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)


def linears(module: Any, roles: tuple[tuple[str, ...], ...]) -> Linears | None:
    """The linear maps of the first of ``roles``, each several names, that ``module`` has whole."""
    for names in roles:
        found = [getattr(module, name, None) for name in names]
        maps = tuple(each for each in found if isinstance(each, nn.Module) and hasattr(base(each), "weight"))
        if len(maps) == len(names):
            return maps
    return None


def width(linear: Any, name: str) -> int:
    """``in_features`` or ``out_features`` of a linear map."""
    found = getattr(linear, name, None)
    if found is None:
        raise Uncovered(f"{type(base(linear)).__name__} in the place of a linear")
    return int(found)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm of some kind."""
    return "Norm" in type(module).__name__ and not list(module.children())


def epsilon(norm: nn.Module) -> float:
    """What ``norm`` adds to the variance; where it does not say, PyTorch's."""
    return next((value for each in _EPSILONS if (value := getattr(norm, each, None)) is not None), 1e-5)


def norm(owner: Any, name: str | None, form: Form, prefix: str = "") -> Norm | None:
    """The norm that ``owner``, called ``prefix`` in its layer, has by ``name``; None without a name."""
    if name is None:
        return None
    module = getattr(owner, name)
    at = f"{prefix}.{name}" if prefix else name
    if not is_norm(module) or (form.norms and at not in form.norms):
        raise Uncovered(f"norm {type(module).__name__}")
    if any(parameter.requires_grad for parameter in module.parameters()):
        raise Uncovered("norms are trained")
    return Norm(module, epsilon(module), form.norms.get(at, NormForm()))


def check_whole(module: nn.Module, read: set[Any]) -> None:
    """Raise :class:`Uncovered` for a child that has weights and was not read."""
    for name, child in module.named_children():
        if child not in read and any(True for _ in child.parameters()):
            raise Uncovered(f"{type(module).__name__} also has {name}")
