"""What a configuration leaves open: decided by this machine, by the launcher and by what the run starts from."""

from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState
from transformers.integrations import get_available_reporting_integrations

from halfbyte import adapters, distributed, optimizers, tracking
from halfbyte.config import Settings
from halfbyte.distributed import zero3
from halfbyte.errors import UserError
from halfbyte.plugin import QLoRAPlugin
from halfbyte.resilience.watch import record_flights


def decide(settings: Settings, recorded: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
    """Settle what depends on this machine: device, precision, optimizer, trackers. Return lines to print.

    ``recorded`` are the options of the checkpoint that the run goes on from: its precision is taken over.
    """
    for key in ("fsdp", "fsdp_config", "deepspeed"):
        if key in settings.given:
            raise UserError(
                f"{key}: how processes share the work is the launcher's to say; take it out, and launch with a file "
                f"of launch/ (see README.md, Support)"
            )
    if settings["auto_find_batch_size"]:
        raise UserError(
            "auto_find_batch_size: it begins the run anew with a smaller batch; write `on_oom: accumulate`, which "
            "keeps the batch"
        )
    state = join_the_others(settings)
    lines = [decide_precision(settings, state.device, recorded), *_take_over_adapter(settings)]
    if zero3.requested():
        for key in {"bf16", "fp16"} - settings.given.keys():
            settings.override(key, False)
        zero3.refuse_precision(settings["dtype"], bf16=settings["bf16"], fp16=settings["fp16"])
    optim, line = optimizers.resolve(settings["optim"], state.device.type)
    if line is not None:
        settings.override("optim", optim)
        lines.append(line)
    if "report_to" not in settings.given and (missing := tracking.wandb_missing()) is not None:
        settings.set_default("report_to", "none")
        lines.append(
            f"wandb: {missing}, so nothing is reported; `wandb login` or WANDB_MODE=offline turns it on"
        )
    _check_reports(settings["report_to"])
    return lines


def _check_reports(report_to: str | list[str] | None) -> None:
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if missing := sorted(set(names) - {"none", "all", *get_available_reporting_integrations()}):
        raise UserError(f"report_to: {', '.join(missing)}: not installed here; install it, or leave it out")
    tracking.check_wandb(names)


def join_the_others(settings: Settings) -> PartialState:
    """Start the process group, once."""
    if not torch.cuda.is_available():
        settings.set_default("use_cpu", True)
    on_cpu = bool(settings["use_cpu"])
    record_flights()
    return PartialState(cpu=on_cpu, **_process_group(settings, on_cpu))


def _process_group(settings: Settings, on_cpu: bool) -> dict[str, Any]:
    timeout = timedelta(seconds=settings["ddp_timeout"])
    return {"timeout": timeout, **({"backend": settings["ddp_backend"]} if on_cpu else {})}


def decide_precision(settings: Settings, device: torch.device, recorded: Mapping[str, Any]) -> str:
    """Make ``dtype``, ``bf16`` and ``fp16`` agree: what was given rules, and the device's best fills in."""
    given = settings.given
    if "dtype" in recorded and not {"dtype", "bf16", "fp16"} & given.keys():
        for key in ("dtype", "bf16", "fp16"):
            settings.override(key, recorded[key])
        return f"compute dtype: {recorded['dtype']} (as in the checkpoint)"
    if "dtype" in given and settings["dtype"] not in (None, "auto"):
        dtype, why = settings["dtype"], "as given"
    elif settings["bf16"] and "bf16" in given:
        dtype, why = "bfloat16", "from bf16: true"
    elif settings["fp16"] and "fp16" in given:
        dtype, why = "float16", "from fp16: true"
    elif "bf16" in given and settings["bf16"] is False:
        dtype, why = "float32", "from bf16: false"
    else:
        dtype, why = (
            str(QLoRAPlugin().compute_dtype(device)).removeprefix("torch."),
            f"chosen for this {device.type}",
        )
    settings.override("dtype", dtype)
    if "bf16" not in given and "fp16" not in given:
        settings.override("bf16", dtype == "bfloat16")
        settings.override("fp16", dtype == "float16" and device.type == "cuda")
    elif "bf16" not in given:
        settings.override("bf16", False if settings["fp16"] else dtype == "bfloat16")
    distributed.refuse_precision(dtype, why)
    return f"compute dtype: {dtype} ({why})"


def _take_over_adapter(settings: Settings) -> list[str]:
    """Set the options that a saved adapter has decided to what it was made with."""
    names = settings["model_name_or_path"], settings["adapter_name_or_path"]
    if not settings["use_peft"] or names == (None, None):
        return []
    _, adapter = adapters.resolve(*names)
    if adapter is None:
        return []
    theirs = adapters.options_of(adapter, {key: settings[key] for key in settings.given if key in settings})
    for key, value in theirs.items():
        settings.override(key, value)
    return [f"adapter: {adapter}, rank {theirs['lora_r']}, alpha {theirs['lora_alpha']}, as it was made"]
