"""Every decision of a run, taken once: device, dtype, strategy, optimizer, trackers, and what is started from.

The command line and ``QLoRAPlugin.trainer`` both ask :func:`decide`; nothing later overrides what it returns.
"""

from collections import ChainMap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState

from halfbyte import adapters, distributed, init_kwargs, optimizers, precision, tracking, unsupported
from halfbyte.checkpoint.manifest import Manifest
from halfbyte.config import Settings
from halfbyte.distributed import Strategy, fsdp2, zero3
from halfbyte.errors import UserError
from halfbyte.model_options import ModelOptions
from halfbyte.resilience.watch import record_flights

# Training arguments a QLoRA run wants other than upstream's, for any TRL config class.
DEFAULTS: dict[str, Any] = {
    "optim": optimizers.DEFAULT,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    # Adapters take part in every step; looking for unused ones breaks non-reentrant checkpointing under DDP.
    "ddp_find_unused_parameters": False,
    "report_to": "wandb",
}
# Micro-batches, which `on_oom: accumulate` may have made smaller.
_MICRO_BATCHES = (
    ("per_device_train_batch_size", "rows_per_batch"),
    ("gradient_accumulation_steps", "batches_per_step"),
)
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What a run is, once the machine, the launcher, a checkpoint and an adapter have had their say.

    ``values`` are options as they are decided, where they differ from what was given; ``session`` those that hold
    for this session only and are not recorded (no evaluation at the start of a resume, smaller micro-batches).
    ``lines`` are to be printed. ``save_level`` is the one that a resumed run takes over.
    """

    device: torch.device
    strategy: Strategy
    dtype: str
    base: str
    revision: str
    adapter: str | None
    quant_storage: str | None = None
    save_level: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    session: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def micro_batches(self) -> dict[str, int]:
        """The micro-batches of this session where they are not the recorded ones; else nothing."""
        return {key: self.session[key] for key, _ in _MICRO_BATCHES if key in self.session}


def join(settings: Settings) -> PartialState:
    """Start the process group as ``settings`` say, once."""
    distributed.refuse_unsupported()
    record_flights()
    on_cpu = bool(settings["use_cpu"]) or ("use_cpu" not in settings.given and not torch.cuda.is_available())
    options: dict[str, Any] = {"timeout": timedelta(seconds=settings["ddp_timeout"])}
    if on_cpu:
        options["backend"] = settings["ddp_backend"]
    return PartialState(cpu=on_cpu, **options)


def for_run(settings: Settings, manifest: Manifest | None, planned: Strategy | None = None) -> Decisions:
    """Decide for the command line; ``manifest`` is that of the checkpoint that the run resumes from.

    ``planned`` is where a run that is planned here would run, in place of the devices of this process.
    """
    for key in ("fsdp", "fsdp_config", "deepspeed"):
        if key in settings.given:
            raise UserError(
                "how processes share the work is decided by the launcher; take it out, and launch with a file of "
                "launch/ (see launch/README.md)",
                option=key,
            )
    if settings["auto_find_batch_size"]:
        raise UserError(
            "it restarts the run with a smaller batch; write `on_oom: accumulate`, which keeps the batch",
            option="auto_find_batch_size",
        )
    found = decide(settings, settings.given.keys(), manifest, planned)
    unsupported.check_samples(settings)
    if "use_cpu" in settings.given or torch.cuda.is_available():
        return found
    return replace(found, values=MappingProxyType({**found.values, "use_cpu": True}))


def for_arguments(model: ModelOptions, args: Any, name_or_path: str | None) -> Decisions:
    """Decide for ``QLoRAPlugin.trainer``: every training argument counts as given."""
    given = {"bf16", "fp16", "use_cpu", "report_to", *_chosen(model)}
    return decide(_by_name(model, args, name_or_path), given)


def for_loop(
    model: ModelOptions, name_or_path: str | None, model_init_kwargs: Mapping[str, Any] | None = None
) -> Decisions:
    """Decide for a loop of one's own, which has no training arguments."""
    options = {**_by_name(model, None, name_or_path), "model_init_kwargs": model_init_kwargs}
    return decide(options, {"report_to", *_chosen(model)})


def decide(
    options: Any,
    given: Collection[str],
    manifest: Manifest | None = None,
    planned: Strategy | None = None,
) -> Decisions:
    """Settle what ``options`` leave open; ``given`` names those that the user wrote, which are kept or refused.

    Where a run is only ``planned``, it is decided for its devices. ``options`` is a mapping, by option name. Raises
    :class:`UserError`, with the option at fault.
    """
    state = PartialState()
    recorded = manifest.config if manifest is not None else _NOTHING
    strategy = planned or distributed.strategy_in_use(on_cpu="use_cpu" in given and bool(options["use_cpu"]))
    device = state.device if planned is None else torch.device(planned.device)
    moved, remaining = init_kwargs.take_over(options, given)
    options, given = ChainMap(moved, options), {*given, *moved}
    values: dict[str, Any] = {**moved, **({} if remaining is None else {"model_init_kwargs": remaining})}
    base, adapter = adapters.resolve(options["model_name_or_path"], options["adapter_name_or_path"])
    revision = options["model_revision"]
    if revision == "main" and adapter is not None:
        revision = adapters.revision_of(adapter)
    dtype, line = precision.settle(options, given, state.device, (base, revision), recorded, values)
    lines = [line]
    if adapter is not None and options["use_peft"]:
        lines.append(_take_over_adapter(options, given, adapter, values))
        adapters.same_quantization(adapter, options)
    if strategy.name in distributed.SHARDED:
        distributed.check_quantized(strategy.name, options["load_in_4bit"])
        if "optim" in options:
            distributed.check_optimizer(_name(options["optim"]))
    if zero3.requested():
        merged = {key: values.get(key, options[key]) for key in ("bf16", "fp16") if key in options}
        zero3.refuse_precision(dtype, bf16=bool(merged.get("bf16")), fp16=bool(merged.get("fp16")))
        zero3.refuse_loraplus(options["loraplus_lr_ratio"])
    storage = None
    if options["load_in_4bit"] and fsdp2.requested():
        storage, note = fsdp2.quantization_storage(options["bnb_4bit_quant_storage"], getattr(torch, dtype))
        lines += [] if note is None else [note]
    if "optim" in options:
        _training(options, given, device.type, strategy.world_size, values, lines)
    return Decisions(
        device=device,
        strategy=strategy,
        dtype=dtype,
        base=base,
        revision=revision,
        adapter=adapter,
        quant_storage=storage,
        save_level=_recorded_level(options, manifest),
        values=MappingProxyType(values),
        session=MappingProxyType(_of_this_session(options, manifest, lines)),
        lines=tuple(lines),
    )


def _take_over_adapter(options: Any, given: Collection[str], adapter: str, values: dict[str, Any]) -> str:
    """Set the options that a saved adapter has decided to what it was made with."""
    theirs = adapters.options_of(adapter, {key: options[key] for key in given if key in options})
    values.update(theirs)
    return f"adapter: {adapter}, rank {theirs['lora_r']}, alpha {theirs['lora_alpha']}, as it was made"


def _training(
    options: Any,
    given: Collection[str],
    device_type: str,
    processes: int,
    values: dict[str, Any],
    lines: list[str],
) -> None:
    """Settle what a Trainer's arguments must have for 4-bit training."""
    unsupported.check(options, device_type, processes)
    optim, line = optimizers.resolve(_name(options["optim"]), device_type)
    if line is not None:
        values["optim"] = optim
        lines.append(line)
    if options["ddp_find_unused_parameters"] is None and options["use_peft"]:
        values["ddp_find_unused_parameters"] = False
        if processes > 1:
            lines.append("ddp_find_unused_parameters: false, since adapters take part in every step")
    dropout = values.get("lora_dropout", options["lora_dropout"])
    if dropout and options.get("disable_dropout"):
        lines.append(f"lora_dropout: {dropout} has no effect, since disable_dropout is true")
    checkpointing = {"use_reentrant": False, **(options["gradient_checkpointing_kwargs"] or {})}
    if options["gradient_checkpointing"]:
        values["gradient_checkpointing_kwargs"] = checkpointing
    if "report_to" not in given and (missing := tracking.wandb_missing()) is not None:
        values["report_to"] = "none"
        lines.append(
            f"wandb: {missing}, so nothing is reported; `wandb login` or WANDB_MODE=offline turns it on"
        )
    tracking.check_trackers(values.get("report_to", options["report_to"]))


def _recorded_level(options: Any, manifest: Manifest | None) -> int | None:
    """The save level that was decided for the same ``memory_budget``, to resume with."""
    if manifest is None or manifest.config.get("memory_budget") != options["memory_budget"]:
        return None
    return manifest.decided.get("save_level")


def _of_this_session(options: Any, manifest: Manifest | None, lines: list[str]) -> dict[str, Any]:
    """What a resumed session does otherwise: the evaluation at the start was done, and micro-batches may be smaller."""
    if manifest is None:
        return {}
    return {"eval_on_start": False, **_recorded_micro_batches(options, manifest, lines)}


def _recorded_micro_batches(options: Any, manifest: Manifest, lines: list[str]) -> dict[str, int]:
    """The micro-batches that the checkpoint's run was brought down to, unless the user changed them."""
    if any(options[key] != manifest.config.get(key) for key, _ in _MICRO_BATCHES):
        return {}
    found = {key: manifest.data_position.get(name) for key, name in _MICRO_BATCHES}
    rows, batches = found.values()
    if rows is None or batches is None or rows == options["per_device_train_batch_size"]:
        return {}
    lines.append(f"resume: micro-batches of {rows}, {batches} a step, as when memory ran out")
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": batches}


def _by_name(model: ModelOptions, args: Any, name_or_path: str | None) -> dict[str, Any]:
    found = {each.name: getattr(args, each.name) for each in fields(args)} if args is not None else {}
    found |= {each.name: getattr(model, each.name) for each in fields(model)}
    return {**found, "model_name_or_path": name_or_path or model.model_name_or_path}


def _chosen(model: ModelOptions) -> set[str]:
    """The options of ``model`` that differ from their defaults."""
    defaults = vars(ModelOptions())
    return {each.name for each in fields(model) if getattr(model, each.name) != defaults[each.name]}


def _name(optim: Any) -> str:
    return str(getattr(optim, "value", optim))
