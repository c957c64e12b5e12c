"""Run one recipe: read the configuration, build, train, finish.

Everything that can fail on what the user wrote fails before the output directory is touched.
"""

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging
from trl import DatasetMixtureConfig

from halfbyte import config, data, distributed, optimizers, tracking
from halfbyte.config import RunArguments, Settings
from halfbyte.distributed import zero3
from halfbyte.errors import UserError
from halfbyte.output import claim, left_as_it_was, save_final
from halfbyte.plugin import TRAINING_DEFAULTS, QLoRAPlugin
from halfbyte.recipe import Recipe

_UPSTREAM = ("trl", "transformers")


@dataclass(frozen=True)
class Run:
    """One parsed run: the instances that the configuration made, and the configuration itself."""

    name: str
    recipe: Recipe
    script: RunArguments
    training: Any
    plugin: QLoRAPlugin
    mixture: DatasetMixtureConfig
    resolved: dict[str, Any]


def main(name: str, recipe: Recipe, argv: list[str]) -> int:
    """Train ``recipe`` as ``argv`` says and return the exit code."""
    settings = config.read(
        argv,
        (RunArguments, recipe.config, QLoRAPlugin, DatasetMixtureConfig),
        prog=f"halfbyte {name}",
        summary=recipe.summary,
        defaults=training_defaults(recipe.config),
    )
    _quieten()
    distributed.refuse_unsupported()
    on_cpu = bool("use_cpu" in settings.given and settings["use_cpu"])
    lines = decide(settings)
    script, training, plugin, mixture = settings.build()
    strategy = distributed.strategy_in_force(on_cpu=on_cpu)
    _hide_hub_token(training)
    run = Run(name, recipe, script, training, plugin, mixture, settings.resolved())
    _train(run, strategy, lines)
    if torch.distributed.is_initialized():
        # Only when all went well: a rank that failed leaves without waiting for the others.
        torch.distributed.destroy_process_group()
    return 0


def training_defaults(cls: type) -> dict[str, Any]:
    """QLoRA's defaults for the fields of ``cls`` whose default is still upstream's, not the recipe's own."""

    def declares(field: str) -> str:
        owner = next((base for base in cls.__mro__ if field in vars(base).get("__annotations__", {})), cls)
        return owner.__module__.partition(".")[0]

    return {field: value for field, value in TRAINING_DEFAULTS.items() if declares(field) in _UPSTREAM}


def decide(settings: Settings) -> list[str]:
    """Settle what depends on this machine: device, precision, optimizer, trackers. Return lines to print."""
    for key in ("fsdp", "fsdp_config", "deepspeed"):
        if key in settings.given:
            raise UserError(
                f"{settings.given[key]}: {key}: how processes share the work is the launcher's to say; take it out, "
                f"and launch with a file of launch/ (see README.md, Support)"
            )
    if not torch.cuda.is_available():
        settings.set_default("use_cpu", True)
    on_cpu = bool(settings["use_cpu"])
    distributed.record_flights()
    state = PartialState(cpu=on_cpu, **_process_group(settings, on_cpu))
    lines = [_decide_precision(settings, state.device)]
    if zero3.requested():
        for key in {"bf16", "fp16"} - settings.given.keys():
            settings.override(key, False)
        zero3.refuse_precision(settings["dtype"], bf16=settings["bf16"], fp16=settings["fp16"])
    optim, line = optimizers.resolve(settings["optim"], state.device.type)
    if line is not None:
        settings.override("optim", optim)
        lines.append(line)
    if "report_to" not in settings.given and not tracking.wandb_ready():
        settings.set_default("report_to", "none")
        lines.append(
            "wandb: no login found, so nothing is reported; `wandb login` or WANDB_MODE=offline turns it on"
        )
    tracking.check_wandb(settings["report_to"])
    return lines


def _process_group(settings: Settings, on_cpu: bool) -> dict[str, Any]:
    timeout = timedelta(seconds=settings["ddp_timeout"])
    return {"timeout": timeout, **({"backend": settings["ddp_backend"]} if on_cpu else {})}


def _decide_precision(settings: Settings, device: torch.device) -> str:
    """Make ``dtype``, ``bf16`` and ``fp16`` agree: what was given rules, and the device's best fills in."""
    given = settings.given
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


def _train(run: Run, strategy: distributed.Strategy, lines: list[str]) -> None:
    is_main = PartialState().is_main_process
    training, plugin = run.training, run.plugin
    resume = _resume_from(training)
    if (problem := distributed.agree(claim_problem(run, resume))) is not None:
        raise UserError(problem)
    with distributed.on_every_rank("preparing the data"):
        tokenizer, _ = plugin.tokenizer(training)
        rows = data.load(run.script, run.mixture, training, run.recipe.data, tokenizer)
    with distributed.on_every_rank("building the trainer"), left_as_it_was(training.output_dir):
        trainer = _build(run, rows)
        if run.recipe.data is not None:
            data.check_labels(trainer, rows.report)
    if is_main:
        moved = claim(training.output_dir, overwrite=run.script.overwrite_output_dir and resume is None)
        if moved is not None:
            lines = [*lines, f"the earlier run in {training.output_dir} is now in {moved}"]
        if plugin.load_in_4bit and plugin.coverage is not None:
            lines = [*lines, plugin.coverage.line()]
        print(*lines, *rows.report.lines(), sep="\n", flush=True)
    PartialState().wait_for_everyone()

    record = tracking.RunRecord(training.output_dir, recipe=run.name)
    record.update(
        config=run.resolved,
        base=plugin.base_record(),
        data=rows.report.as_dict(),
        fast=plugin.fast_path.as_dict(),
        strategy={**strategy.as_dict(), "devices": distributed.gather(strategy.device)},
    )
    tracker = tracking.track(trainer, record)
    distributed.watch_invariants(trainer, on_begin=lambda facts: record.update(strategy=facts))
    distributed.watch(trainer, training.ddp_timeout, on_failure=lambda: tracker.finish("failed"))
    try:
        trainer.train(resume_from_checkpoint=resume)
        if trainer.eval_dataset is not None and not _evaluated_last(trainer):
            trainer.evaluate()
        save_final(trainer, training.output_dir, distributed.gathered_adapters(trainer.model))
    except BaseException as error:
        tracker.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    tracker.finish("completed", _next_command(run))
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=run.script.dataset_name)


def claim_problem(run: Run, resume: str | None) -> str | None:
    """Why this run may not write into its output directory, or None."""
    directory = Path(run.training.output_dir)
    if directory.exists() and not directory.is_dir():
        return f"output_dir: {directory} is a file; name a directory"
    used = directory.is_dir() and any(directory.iterdir())
    if used and resume is None and not run.script.overwrite_output_dir:
        return (
            f"output_dir: {directory} is not empty; choose another, continue it with "
            f"`--resume_from_checkpoint auto`, or move it aside with `--overwrite_output_dir`"
        )
    return None


def _resume_from(training: Any) -> str | None:
    """The checkpoint to resume from: TRL's ``true`` means ``auto``, the newest one."""
    wanted = training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none"):
        return None
    if str(wanted).lower() in ("true", "auto"):
        directory = Path(training.output_dir)
        return distributed.agree(get_last_checkpoint(str(directory)) if directory.is_dir() else None)
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise UserError(
            f"resume_from_checkpoint: {wanted!r} is not a checkpoint (it has no trainer_state.json)"
        )
    return str(wanted)


def _build(run: Run, rows: data.RunData) -> Trainer:
    recipe = run.recipe
    if recipe.build is not None:
        return recipe.build(run.training, run.plugin, rows)
    assert recipe.trainer is not None
    return run.plugin.trainer(
        data.counted(recipe.trainer, rows.report),
        args=run.training,
        train_dataset=rows.train,
        eval_dataset=rows.eval,
    )


def _evaluated_last(trainer: Trainer) -> bool:
    """Whether the last step of the run has an evaluation in the log."""
    rows = [row for row in trainer.state.log_history if any(key.startswith("eval_") for key in row)]
    return bool(rows) and rows[-1]["step"] == trainer.state.global_step and trainer.state.global_step > 0


def _next_command(run: Run) -> str | None:
    if run.recipe.next is None:
        return None
    return run.recipe.next.format(output_dir=run.training.output_dir, model=run.plugin.resolve()[0])


def _hide_hub_token(training: Any) -> None:
    """Move the token to where huggingface_hub looks for it: checkpoints pickle the arguments as they are."""
    if training.hub_token is not None:
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None


def _quieten() -> None:
    """Silence upstream's progress bars and deprecation notices: this run prints its own lines."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
