"""The proof that state mixers may see rows: found in a small model, and compared with each sequence alone.

A mixer is what a layer hands its stream to, mixes tokens, and is no attention that a forest reaches. Which those are
is not read from names but from what changes with the first token. Then the small model (:mod:`halfbyte.fast.kinds`)
computes a padding-free batch, and each of its sequences by itself without anything changed: its outputs and the
gradients of its inputs must be equal.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.fast import kinds, rows, varlen
from halfbyte.fast.forest import ROOT, Forest
from halfbyte.fast.kinds import Call
from halfbyte.fast.norm_proof import equal
from halfbyte.multimodal import language_model
from halfbyte.state_kernels import torch_functions

_TOKENS = 9
# Of one group of rows: several at once, and padding.
_PACKED = Forest.of_lengths([3, 40, 1, 33, 25])
# Two pairs, of which one has a side that ends with the prefix.
_PAIRS = Forest.of_lengths([6, 20, 5, 4, 0, 9], [ROOT, 0, 0, ROOT, 3, 3])


@dataclass(frozen=True)
class Mixed:
    """The classes of a model's state mixers, and how a forest comes to them."""

    mixers: tuple[type[nn.Module], ...]
    carry: rows.Carry

    def install(self, model: PreTrainedModel) -> None:
        """Let the mixers of ``model`` see rows."""
        rows.install(_stack(model)[0], self.mixers, self.carry)


def prove(model: PreTrainedModel, attention: str, *, trees: bool) -> Mixed | str:
    """Return what of ``model`` sees rows, or why that is not what its sequences compute alone.

    ``attention`` is the name under which :mod:`halfbyte.fast.varlen` is registered; ``trees`` says that sequences share
    prefixes in a batch.
    """
    found = _stack(model)
    if isinstance(found, str):
        return found
    stack, name = found
    layers = getattr(stack, name)
    first = {kinds.kind(each): index for index, each in reversed(list(enumerate(layers)))}

    def show(small: Any, those: list[nn.Module]) -> Mixed | str:
        return _shown(small, those, attention, _PAIRS if trees else _PACKED)

    with (
        torch_functions(stack),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.enable_grad(),
    ):
        return kinds.on_small(stack, name, sorted(first.values()), show)


def _stack(model: PreTrainedModel) -> Any:
    """The module that has the decoder layers of ``model`` and what it calls them, or why there is none."""
    path = language_model(model)
    within = model.base_model if path is None else model.get_submodule(path)
    found = [
        (owner, name)
        for owner in within.modules()
        for name, children in owner.named_children()
        if isinstance(children, nn.ModuleList)
        and any(isinstance(each, GradientCheckpointingLayer) for each in children)
    ]
    if len(found) != 1 or not hasattr(found[0][0], "config"):
        return f"{type(model).__name__} is not one stack of layers"
    return found[0]


def _shown(small: Any, layers: list[nn.Module], attention: str, forest: Forest) -> Mixed | str:
    who = type(small).__name__
    embeddings = small.get_input_embeddings().weight
    ids = torch.arange(forest.ends[-1]).remainder(len(embeddings))
    inputs = embeddings[ids][None].detach().requires_grad_()
    gradient = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1))
    alone = _alone(small, forest, inputs, gradient)
    attending: set[nn.Module] = set()
    varlen.register()
    small.set_attn_implementation(attention)
    with varlen.observed(lambda module, _: attending.add(module)):
        mixers = _mixers(small, layers, attending)
    if not mixers:
        return f"{who} mixes tokens outside of what its layers hand their stream to"
    reasons = []
    for carry in rows.CARRIES:
        rows.remove(small)
        rows.install(small, mixers, carry)
        reached: list[tuple[nn.Module, Forest | None]] = []
        try:
            with varlen.observed(lambda *seen, found=reached: found.append(seen)):
                together = _together(small, forest, inputs, gradient)
        except Exception as error:  # whatever a model raises on such a batch, it keeps padded ones
            reasons.append(f"{who} fails on a padding-free batch ({type(error).__name__}: {error})")
            continue
        mixing = {each for each in small.modules() if isinstance(each, mixers)}
        if not attending | mixing <= {module for module, found in reached if found == forest}:
            reasons.append(f"{who} does not pass sequence boundaries to its layers")
        elif not _same(alone, together, forest):
            reasons.append(f"{who} computes other values on a padding-free batch than on its sequences")
        else:
            return Mixed(mixers, carry)
    return reasons[-1]


def _mixers(small: Any, layers: list[nn.Module], attending: set[nn.Module]) -> tuple[type[nn.Module], ...]:
    """The classes of the modules in ``layers`` that mix tokens and have no attention; fills ``attending``."""
    inside = {module: None for layer in layers for module in layer.modules()}
    ids = torch.arange(1, 1 + _TOKENS)[None]
    with torch.no_grad():
        called = kinds.kept(list(inside), lambda: small(input_ids=ids, use_cache=False))
    calls = {each.module: each for each in called}

    def within(module: nn.Module) -> Iterator[type[nn.Module]]:
        for child in module.children():
            if child in attending or (child in calls and not _mixes(calls[child])):
                continue
            if child in calls and attending.isdisjoint(child.modules()):
                yield type(child)
            else:
                yield from within(child)

    return tuple({cls: None for layer in layers for cls in within(layer)})


@torch.no_grad()
def _mixes(call: Call) -> bool:
    """Whether what ``call`` returns for later tokens depends on the first one."""
    own = type(call.module).forward
    if call.hidden.dim() != 3 or call.hidden.shape[1] != _TOKENS:
        return False

    def later(hidden: Tensor) -> Tensor | None:
        y = own(call.module, hidden, **call.kwargs)
        y = y[0] if isinstance(y, tuple) else y
        return y[:, 1:] if isinstance(y, Tensor) and y.shape[:2] == hidden.shape[:2] else None

    changed = call.hidden.clone()
    changed[:, 0] += 1
    before, after = later(call.hidden), later(changed)
    return before is not None and after is not None and not equal(after, before)


def _sequences(forest: Forest) -> Iterator[tuple[Tensor, int]]:
    """The tokens of each sequence from a root to a leaf, and how many of them an earlier one has already."""
    seen: set[int] = set()
    for leaf in forest.leaves:
        path = forest.path(leaf)
        shared = sum(forest.spans[i][1] - forest.spans[i][0] for i in path if i in seen)
        seen.update(path)
        yield forest.tokens(leaf), shared


def _alone(small: Any, forest: Forest, inputs: Tensor, gradient: Tensor) -> tuple[list[Tensor], Tensor]:
    """The output of each sequence by itself, and the sum of the gradients of ``inputs``."""
    outputs, total = [], torch.zeros_like(inputs)
    for at, shared in _sequences(forest):
        output = small(inputs_embeds=inputs[:, at], use_cache=False)[0]
        weights = gradient[:, at].clone()
        weights[:, :shared] = 0
        total += torch.autograd.grad(output, inputs, weights)[0]
        outputs.append(output.detach())
    return outputs, total


def _together(small: Any, forest: Forest, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a padding-free batch, as it comes from a collator, and the gradient of ``inputs``."""
    given: dict[str, Any] = {"position_ids": forest.positions()}
    if forest.branches:
        given["attention_mask"] = forest.tensor()
    else:
        cumulative = torch.tensor([0, *forest.ends], dtype=torch.int32)
        given |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), cumulative)
    output = small(inputs_embeds=inputs, use_cache=False, **given)[0]
    return output.detach(), torch.autograd.grad(output, inputs, gradient)[0]


def _same(alone: tuple[list[Tensor], Tensor], together: tuple[Tensor, Tensor], forest: Forest) -> bool:
    """Whether every sequence has the same output, and every segment the same gradient."""
    outputs = [
        (together[0][:, at], output) for (at, _), output in zip(_sequences(forest), alone[0], strict=True)
    ]
    gradients = [(together[1][:, a:b], alone[1][:, a:b]) for a, b in forest.spans if b > a]
    return all(equal(mine, theirs) for mine, theirs in outputs + gradients)
