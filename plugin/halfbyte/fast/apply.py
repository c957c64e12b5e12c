"""Make a model, and the trainer around it, run the fast step; say which path each part took and why."""

import types
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTTrainer

from halfbyte.fast import batches, budget, head, layer, linear

ON = "on"


@dataclass
class Path:
    """What of a run is fused, and why the rest is not; ``run.json`` keeps it under ``fast``."""

    mode: str = "auto"
    reason: str | None = None
    layers: int = 0
    level: int | None = None
    memory: budget.Choice | None = None
    layers_apart: dict[str, int] = field(default_factory=dict)
    linears: int = 0
    plain: dict[str, int] = field(default_factory=dict)
    autocast: str | None = None
    head: str | None = None
    batches: str | None = None

    def as_dict(self) -> dict[str, Any]:
        if self.mode == "none":
            return {"mode": self.mode, "reason": self.reason}
        found = {name: value for name, value in vars(self).items() if value not in (None, {})}
        return found | ({"memory": self.memory.as_dict()} if self.memory is not None else {})

    def line(self) -> str:
        """The path in one line."""
        if self.mode == "none":
            return f"fast: none ({self.reason})"
        parts = [f"{self.layers} layers fused (save level {self.level})"] if self.layers else []
        parts += [f"{count} not as layers ({why})" for why, count in self.layers_apart.items()]
        parts.append(f"{self.linears} linears fused")
        parts += [f"{count} not ({why})" for why, count in self.plain.items()]
        for name, state in (("head in tiles", self.head), ("no padding", self.batches)):
            if state is not None:
                parts.append(name if state == ON else f"not {name} ({state})")
        return "fast: " + ", ".join(parts)


def refusal(args: Any | None) -> str | None:
    """Why a trainer with ``args`` must run plain TRL, or None; a loop of one's own has no arguments."""
    if args is None:
        return None
    if args.torch_compile:
        return "torch_compile is on, which fuses for itself; take it out for the fast step"
    if args.use_liger_kernel:
        return "use_liger_kernel is on, which patches the same modules; take it out for the fast step"
    return None


def apply(
    model: PreTrainedModel | PeftModel,
    trainer: Trainer | None = None,
    *,
    checkpointing: bool = True,
    memory_budget: str = "auto",
    recorded_level: int | None = None,
) -> Path:
    """Fuse what is covered in ``model``, and in ``trainer`` if it is SFT's; the rest stays as it is.

    Nothing is copied or renamed: parameters, adapters and hooks are PEFT's before and after. Fused layers
    keep everything without ``checkpointing``, what ``memory_budget`` allows with it (``recorded_level``, where a
    resumed run has decided already), and nothing beside their input where no ``trainer`` says how many tokens a
    step has.
    """
    path = Path()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(trainer, SFTTrainer):  # before the layers: a fused one no longer shows what attention sees
        path.batches = batches.install(trainer, base) or ON
    _fuse_linears(base, path)
    if isinstance(model, PeftModel) and path.linears:
        _fuse_layers(model, path, checkpointing)
    if path.layers and checkpointing and trainer is not None:
        path.memory = budget.apply(model, memory_budget, _tokens(trainer, base), recorded_level)
        path.level = path.memory.level if path.memory is not None else path.level
    if isinstance(trainer, SFTTrainer):
        path.head = head.install(base) or ON
    path.autocast = _leave_autocast(base)
    return path


def _tokens(trainer: Trainer, base: PreTrainedModel) -> int:
    """The most tokens that one forward of ``trainer`` can have on one rank."""
    length = (
        getattr(trainer.args, "max_length", None) or base.config.get_text_config().max_position_embeddings
    )
    rows = 1 if isinstance(trainer, SFTTrainer) else 2  # preference trainers take chosen and rejected at once
    return int(rows * length * trainer.args.per_device_train_batch_size)


def _fuse_layers(model: PeftModel, path: Path, checkpointing: bool) -> None:
    path.level = min(layer.LEVELS) if checkpointing else max(layer.LEVELS)
    apart: Counter[str] = Counter()
    for module in model.get_base_model().modules():
        if isinstance(module, GradientCheckpointingLayer):
            reason = layer.fuse(module, model.active_adapter, path.level)
            if reason is None:
                path.layers += 1
            else:
                apart[reason] += 1
    path.layers_apart = dict(apart)


def _fuse_linears(base: torch.nn.Module, path: Path) -> None:
    plain: Counter[str] = Counter()
    for module in base.modules():
        if linear.fuse(module):
            path.linears += 1
            variants: dict[str, Any] = module.lora_variant  # type: ignore[assignment]
            for name, variant in variants.items():
                plain[f"{name} is {type(variant).__name__.removesuffix('LinearVariant')}"] += 1
        elif isinstance(module, LoraLayer):
            plain[f"adapter on {type(module.get_base_layer()).__name__}"] += 1
    path.plain = dict(plain)


def _leave_autocast(base: PreTrainedModel) -> str:
    """Run ``base`` outside autocast where that changes no dtype: it is in autocast's dtype throughout.

    Autocast then only costs: it looks at every operation, and casts adapters that are cast already.
    """
    adapters = {
        id(p) for m in base.modules() if isinstance(m, linear.FusedLinear4bit) for p in m.parameters()
    }
    rest = [p for p in base.parameters() if id(p) not in adapters]
    dtypes = {p.dtype for p in rest if p.is_floating_point()}
    if any(p.requires_grad for p in rest):
        return "kept: weights other than LoRA's are trained"
    if len(dtypes) != 1:
        return f"kept: the base is in {', '.join(sorted(map(str, dtypes)))}"
    (dtype,) = dtypes
    inner = base.forward

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        device = self.device.type
        if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != dtype:
            return inner(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return inner(*args, **kwargs)

    # `generate` and the Trainer read the signature of a model's forward.
    forward.__wrapped__ = inner  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)
    return f"off: all in {dtype}"
