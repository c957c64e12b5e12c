"""Fuse a model for training: each part where it is covered, and a report of what was fused and why the rest was not."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from trl import DPOConfig

from halfbyte import distributed
from halfbyte.fast import apart, autocast, batches, experts, head, layer, linear, reading
from halfbyte.fast.parts import Decoder, Uncovered
from halfbyte.fast.proof import Proofs
from halfbyte.fast.report import ON, FusionReport
from halfbyte.fast.scope import Scope
from halfbyte.fast.scores import USUAL


def refusal(args: TrainingArguments) -> str | None:
    """Return why a trainer with ``args`` must run plain TRL, or None."""
    if args.torch_compile:
        return "torch_compile is on, which fuses by itself; remove it to use the fast step"
    if args.use_liger_kernel:
        return "use_liger_kernel is on, which patches the same modules; remove it to use the fast step"
    return None


def fuse(
    model: PreTrainedModel | PeftModel,
    *,
    scope: Scope | None = None,
    args: TrainingArguments | None = None,
    collator: Any = None,
    checkpointing: bool = True,
) -> FusionReport:
    """Fuse what is covered in ``model``, as far as ``scope`` allows; the rest stays as it is.

    Nothing is copied or renamed: parameters, adapters and hooks stay PEFT's. ``args`` and ``collator`` are a trainer's;
    a loop of one's own has none. Fused layers keep all intermediates without ``checkpointing``, and nothing but their
    input with it, until :func:`halfbyte.memory.choose` allows more.
    With ``args`` it is a collective: batches are padding-free on all ranks or on none.
    """
    scope = Scope() if scope is None else scope
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    chunked = unpadded = None
    if "head" in scope.parts:
        chunked = scope.ruled_out.get("head") or head.install(base, _told(args)) or ON
    trees = scope.sides == 2 and chunked == ON  # the head scores them
    attention = base.config._attn_implementation
    # Before the layers: a fused one no longer shows what attention receives.
    if "padding_free" in scope.parts:
        assert args is not None
        unpadded = scope.ruled_out.get("padding_free")
        if unpadded is None and scope.sides == 2 and not trees:
            unpadded = "pairs require the chunked LM head"
        prepare = batches.prepare_pairs if trees else batches.prepare_rows
        unpadded = unpadded or prepare(base, args, collator) or ON
    if args is not None and (agreed := _agreed(unpadded)) != unpadded:
        batches.leave(base, attention)
        unpadded = agreed
    linears, plain = _fuse_linears(base) if "linears" in scope.parts else (0, {})
    packed = _fuse_experts(model) if "linears" in scope.parts else 0
    layers, level = _Layers(), None
    if "layers" in scope.parts and _has_4bit_adapters(model):
        level = layer.LEVELS[0] if checkpointing else layer.LEVELS[-1]
        layers = _fuse_layers(model, level, args)
    return FusionReport(
        layers=layers.fused,
        level=level,
        layers_apart=dict(layers.apart),
        keeping=layers.keeping,
        parts=dict(layers.parts),
        linears=linears,
        experts=packed,
        plain=plain,
        head=chunked,
        batches=unpadded,
        trees=trees and unpadded == ON,
        autocast=autocast.leave(base),
    )


def unfuse(model: PreTrainedModel | PeftModel) -> None:
    """Undo :func:`fuse` as it is done without a trainer: linears, layers, and the way around autocast."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.__dict__.pop("forward", None)
    for module in base.modules():
        linear.unfuse(module)
        experts.unfuse(module)
        layer.unfuse(module)
        apart.leave(module)


def _agreed(state: str | None) -> str | None:
    """``state`` where it is that of all ranks, else what is not :data:`ON` on the first rank that has it."""
    return next((each for each in distributed.gather(state) if each != ON), ON)


def _told(args: Any) -> tuple[str, ...]:
    """What TRL's loss reads of the head beside log-probabilities, for its figures and weights."""
    if not isinstance(args, DPOConfig):
        return USUAL
    return (*USUAL, "mean_logits", *(("log_sum_sq_probs",) if args.use_weighting else ()))


def _has_4bit_adapters(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and any(isinstance(each, Linear4bit) for each in model.modules())


@dataclass
class _Layers:
    """How many layers are ``fused``, how many not by reason (``apart``), the fused ``parts`` of these by name.

    ``keeping`` are those of ``apart`` that have a save level all the same.
    """

    fused: int = 0
    apart: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    keeping: int = 0


def _fuse_layers(model: Any, level: int, args: TrainingArguments | None) -> _Layers:
    """Fuse decoder layers at save ``level``, or of one that is not covered its attention and MLP.

    What would run its own forward in every step is left alone, so that the report says so.
    """
    found = _Layers()
    base = model.get_base_model()
    proofs = Proofs(base)
    # Where the step runs: a planned model is on meta.
    device = (
        args.device
        if args is not None
        else torch.device("cpu")
        if base.device.type == "meta"
        else base.device
    )
    hidden = torch.empty(0, dtype=base.get_input_embeddings().weight.dtype, device=device)

    def fuse_one(module: nn.Module, read: Callable[[], layer.Parts]) -> str | None:
        try:
            parts = read()
            only_read = isinstance(parts, Decoder) and proofs.may_leave_out(module)
            reason = layer.fuse(module, parts, model.active_adapter, level, only_read=only_read)
        except Uncovered as uncovered:
            return str(uncovered)
        if reason is None:
            with _autocast(hidden, args):
                reason = layer.never_fused(module, hidden)
            if reason is not None:
                layer.unfuse(module)
        return reason

    for module in proofs.layers:
        reason = fuse_one(module, functools.partial(_read, module, proofs))
        if reason is None:
            found.fused += 1
            continue
        found.apart[reason] += 1
        for name, form in proofs.parts(module).items():
            part = module.get_submodule(name)
            if fuse_one(part, functools.partial(reading.read_part, part, form, name)) is None:
                found.parts["attention" if reading.is_attention(part) else "MLP"] += 1
        found.keeping += apart.take(module, level)
    return found


def _read(module: nn.Module, proofs: Proofs) -> Decoder:
    return reading.read(module, proofs.whole(module))


def _autocast(hidden: torch.Tensor, args: TrainingArguments | None) -> torch.autocast:
    """The autocast that a trainer with ``args`` enters; none in a loop of one's own."""
    if args is None:
        return torch.autocast(hidden.device.type, enabled=False)
    return autocast.entered(args, hidden.device, hidden.dtype)


def _fuse_experts(model: nn.Module) -> int:
    """Fuse the packed experts of every layer; return how many layers. Those with adapters are fused already."""
    return sum(experts.fuse(module, held) for _, module, held in experts.within(model))


def _fuse_linears(base: nn.Module) -> tuple[int, dict[str, int]]:
    """Fuse 4-bit LoRA linears; return how many, and how many run PEFT's forward by reason."""
    count = 0
    plain: Counter[str] = Counter()
    for module in base.modules():
        if linear.fuse(module):
            count += 1
            variants: dict[str, Any] = module.lora_variant  # type: ignore[assignment]
            for name, variant in variants.items():
                plain[f"{name} is {type(variant).__name__.removesuffix('LinearVariant')}"] += 1
        elif isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            plain[f"adapter on {type(module.get_base_layer()).__name__}"] += 1
    return count, dict(plain)
