"""The proof of a description: a small layer of the same class, computed fused and by its own forward, compared.

It is made once for every kind of layer, in a small model (:mod:`halfbyte.fast.kinds`). What the parts do not say, such
as the pairs of channels that are rotated together, is tried until the outputs and the gradients of the input are equal.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.fast import adapted, kinds, layer, reading
from halfbyte.fast.kinds import Call, kept
from halfbyte.fast.norm_proof import equal, norm_forms
from halfbyte.fast.parts import Form, Uncovered
from halfbyte.fast.rope import PAIRINGS
from halfbyte.state_kernels import torch_functions

_TOKENS = 9


class Proofs:
    """What is proven of the decoder layers of one model, each kind when it is first requested."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
        self._places: dict[nn.Module, tuple[Any, str, int]] = {}
        for owner in model.modules():
            for name, children in owner.named_children():
                if isinstance(children, nn.ModuleList):
                    self._places.update((each, (owner, name, i)) for i, each in enumerate(children))
        self._kinds = {each: kinds.kind(each) for each in self.layers}
        self._calls: dict[Any, Call | str] = {}
        self._wholes: dict[Any, Form | str] = {}
        self._parts: dict[Any, dict[str, Form]] = {}
        self._apart: dict[tuple[Any, str], bool] = {}

    def whole(self, module: nn.Module) -> Form:
        """Return the form of the whole layer ``module``; raise :class:`Uncovered` for one without."""
        kind = self._kinds[module]
        if kind not in self._wholes:
            with torch_functions(self._model):
                self._wholes[kind] = _whole(self._call(module))
        found = self._wholes[kind]
        if isinstance(found, str):
            raise Uncovered(found)
        return found

    def parts(self, module: nn.Module) -> dict[str, Form]:
        """Return the forms of what is proven by itself in the layer ``module``, attentions and MLPs, by name."""
        kind = self._kinds[module]
        if kind not in self._parts:
            with torch_functions(self._model):
                self._parts[kind] = _parts(self._call(module))
        return self._parts[kind]

    def may_leave_out(self, module: nn.Module) -> bool:
        """Whether tokens may be left out of the output of the layer ``module``, which is the last one.

        What the model computes of its output then is each token's own. A layer that is proven has shown it.
        """
        owner, name, index = self._places[module]
        return index == len(getattr(owner, name)) - 1 and self._apart[owner, name]

    def _call(self, module: nn.Module) -> Call | str:
        kind = self._kinds[module]
        if kind not in self._calls:
            place = self._places.get(module)
            if place is None or not hasattr(place[0], "config"):
                return f"{type(module).__name__} is not one of the layers that are fused"
            owner, name, _ = place
            same = [each for each, found in self._places.items() if found[:2] == (owner, name)]
            self._calls.update(self._small_calls(owner, name, same))
        return self._calls[kind]

    def _small_calls(self, owner: Any, name: str, layers: list[nn.Module]) -> dict[Any, Call | str]:
        """The call of one layer of each kind in a small model like ``owner``."""
        first: dict[Any, int] = {}
        for index, each in enumerate(layers):
            if each in self._kinds:
                first.setdefault(self._kinds[each], index)
        if not any(isinstance(each, LoraLayer) for layer in layers for each in layer.modules()):
            return dict.fromkeys(first, "no adapters")

        def show(small: Any, those: list[nn.Module]) -> list[Call]:
            self._apart[owner, name] = _reads_tokens_apart(small, getattr(small, name)[-1])
            return _calls(small, those)

        found = kinds.on_small(owner, name, list(first.values()), show)
        return dict.fromkeys(first, found) if isinstance(found, str) else dict(zip(first, found, strict=True))


def _calls(model: Any, layers: list[nn.Module]) -> list[Call]:
    """Run ``model`` on a few tokens and return how it called ``layers``."""
    ids = torch.arange(1, 1 + _TOKENS, device="cpu")[None]
    with torch.no_grad(), torch.device("cpu"):
        return kept(layers, lambda: model(input_ids=ids, use_cache=False))


def _reads_tokens_apart(model: Any, last: nn.Module) -> bool:
    """Whether ``model`` returns for the last tokens the same where its ``last`` layer has returned these alone."""
    ids = torch.arange(1, 1 + _TOKENS, device="cpu")[None]
    with torch.no_grad(), torch.device("cpu"):
        whole = model(input_ids=ids, use_cache=False)[0]
        hook = last.register_forward_hook(lambda *call: call[-1][:, -2:])
        try:
            return torch.equal(model(input_ids=ids, use_cache=False)[0], whole[:, -2:])
        except Exception:  # whatever a model raises, its last layer returns all
            return False
        finally:
            hook.remove()


def _whole(call: Call | str) -> Form | str:
    """The form of a whole layer, or why there is none."""
    if isinstance(call, str):
        return call
    forms = _forms(call.module, parallels=(False, True))

    def fused(form: Form) -> Any:
        return layer.forward_of(call.module, reading.read(call.module, form))

    return _proven(call, forms, fused)


def _parts(call: Call | str) -> dict[str, Form]:
    """The forms of the attentions and MLPs of a layer."""
    if isinstance(call, str):
        return {}
    whole = call.module
    names = {module: name for name, module in whole.named_modules() if name}
    with torch.no_grad():
        calls = kept(list(names), lambda: _own(call, call.hidden))
    forms = _forms(whole)
    found: dict[str, Form] = {}
    for each in calls:
        name = names[each.module]
        each = replace(each, attention=reading.is_attention(each.module))
        form = _proven(each, forms, functools.partial(_part, each.module, name))
        if isinstance(form, Form):
            found[name] = form
    return found


def _forms(module: nn.Module, parallels: tuple[bool, ...] = (False,)) -> list[Form]:
    """What the names in a layer leave open, each way."""
    by_head = (False, True) if reading.has_one_map(module) else (False,)
    norms = norm_forms(module)
    return [Form(*each, norms) for each in product((*PAIRINGS, None), (False, True), parallels, by_head)]


def _part(module: nn.Module, name: str, form: Form) -> Any:
    return layer.forward_of(module, reading.read_part(module, form, name))


def _proven(call: Call, forms: list[Form], fused: Callable[[Form], Any]) -> Form | str:
    """The first of ``forms`` that computes what the module of ``call`` does, or why there is none."""
    reasons: list[str] = []
    expected: tuple[Tensor, Tensor] | None = None
    gradient = torch.randn(call.hidden.shape, generator=torch.Generator().manual_seed(1), device="cpu")
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.enable_grad():
        for form in forms:
            try:
                part = fused(form)
                adapted.check_linears(call.module, part.parts)
                expected = expected or _both(functools.partial(_own, call), call.hidden, gradient)
                found = _both(functools.partial(_fused, part, call), call.hidden, gradient)
            except Uncovered as why:
                reasons.append(str(why))
                continue
            except Exception as error:  # what is no such layer may fail as one in any way
                reasons.append(f"{type(call.module).__name__} fails as one ({type(error).__name__}: {error})")
                continue
            if all(equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True)):
                return form
            reasons.append(f"{type(call.module).__name__} computes something else than its parts say")
    return max(reasons, key=lambda reason: (reasons.count(reason), reason))


def _both(compute: Callable[[Tensor], Any], hidden: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The output for ``hidden`` and the gradient of ``hidden``, less what passes around the module unchanged."""
    x = hidden.detach().clone().requires_grad_()
    y = compute(x)
    if not isinstance(y, Tensor) or y.shape != hidden.shape:
        raise Uncovered("it returns more than its stream")
    (dx,) = torch.autograd.grad(y, x, gradient)
    return y.detach(), dx


def _own(call: Call, x: Tensor) -> Any:
    """What the module returns by its own forward."""
    y = type(call.module).forward(call.module, x, **call.kwargs)
    return y[0] if call.attention and isinstance(y, tuple) and len(y) == 2 else y


def _fused(part: Any, call: Call, x: Tensor) -> Any:
    """What the fused form returns for the same call, one sequence without a mask."""
    given = dict(call.kwargs)
    if "attention_mask" in given:
        given |= {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, x.shape[-2]], dtype=torch.int32)}
    y = part.apply(part.read(x, given), x)
    return y[0] if isinstance(y, tuple) else y
