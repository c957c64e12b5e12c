"""One run, top to bottom: settings, decisions, data, trainer, train, finish.

Everything that can fail on invalid input fails before the output directory is touched.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from transformers import Trainer
from transformers.utils import logging as transformers_logging
from trl import DatasetMixtureConfig

from halfbyte import config, data, distributed, fast, loading, quantization, resolve
from halfbyte.bound import build_trainer
from halfbyte.checkpoint import changes, manifest
from halfbyte.checkpoint.output import claim, left_as_it_was, save_final
from halfbyte.checkpoint.resume import Resume, find
from halfbyte.config import RunArguments, Settings
from halfbyte.data import RunData
from halfbyte.errors import Stopped, UserError
from halfbyte.plugin import QLoRAPlugin
from halfbyte.recipe import Recipe
from halfbyte.resilience.memory import advice
from halfbyte.resilience.signals import Signals
from halfbyte.resilience.watch import watch
from halfbyte.resolve import Decisions
from halfbyte.tracking import RunRecord, Tracker, next_command, resume_command
from halfbyte.trainer.base import Conduct
from halfbyte.trainer.build import with_values
from halfbyte.trainer.upstream import without_pickled_arguments
from halfbyte.wording import say

_UPSTREAM = ("trl", "transformers")


@dataclass(frozen=True)
class Inputs:
    """What a run reads, with its fingerprints: rows, and the tokenizer that rendered them."""

    rows: RunData
    base: Mapping[str, Any]
    fingerprints: Mapping[str, Any]


def main(name: str, recipe: Recipe, argv: list[str], written: config.Written | None = None) -> int:
    """Train ``recipe`` with the settings of ``argv``, which is ``written`` once collected; return the exit code."""
    settings = read(name, recipe, argv if written is None else written)
    try:
        train(name, recipe, argv, settings)
    except UserError as error:
        settings.placed(error)
        raise
    if torch.distributed.is_initialized():
        # Only when all went well: a rank that failed leaves without waiting for the others.
        torch.distributed.destroy_process_group()
    return 0


def read(name: str, recipe: Recipe, written: list[str] | config.Written) -> Settings:
    """The settings that the command line, collected or not, gives to ``recipe``."""
    return config.read(
        written,
        (RunArguments, recipe.config, QLoRAPlugin, DatasetMixtureConfig),
        prog=f"halfbyte {name}",
        summary=recipe.summary,
        defaults=training_defaults(recipe.config),
    )


def train(name: str, recipe: Recipe, argv: list[str], settings: Settings) -> None:
    """Run ``recipe`` with ``settings`` from the first decision to the last file; on every rank."""
    _quieten()
    settings.check(QLoRAPlugin)  # before what depends on the machine
    distributed.refuse_unsupported()
    resolve.join(settings)
    resume = find(settings["output_dir"], settings["resume_from_checkpoint"])
    decisions = resolve.for_run(settings, resume.manifest)
    settings = settings.with_values(**decisions.values)
    script, args, plugin, mixture = settings.build()
    args = with_values(args, {**decisions.session, **_own_arguments(args)})
    overwrite = script.overwrite_output_dir and resume.path is None
    _require_usable(args.output_dir, resume, overwrite)
    changes.check_keys(script.allow_config_change, settings.resolved())
    allow = partial(changes.compare, resume.manifest, resume.path, script.allow_config_change)
    changed = allow({**settings.resolved(), "world_size": decisions.strategy.world_size})

    inputs = _prepare(recipe, script, args, plugin, mixture, decisions)
    changed += allow(inputs.fingerprints)
    record = _record(name, settings, resume)
    following = next_command(recipe.next, args.output_dir, decisions.base, adapter=plugin.use_peft)
    tracker = Tracker(
        record,
        main=PartialState().is_main_process,
        bar=not args.disable_tqdm,
        next_command=following,
        resume_command=resume_command(name, argv),
    )
    signals = Signals(lambda _: tracker.abandon())
    conduct = _conduct(script, settings, inputs, resume, tracker, signals)
    with distributed.on_every_rank("building the trainer"), left_as_it_was(args.output_dir):
        trainer = build_trainer(name, recipe, settings, plugin, decisions, args, inputs.rows, conduct)
    _describe(record, settings, inputs, decisions, trainer)
    moved = _claim(args.output_dir, resume, overwrite)
    coverage = [trainer.report.coverage.line()] if plugin.load_in_4bit else []
    say(*decisions.lines, *resume.lines, *changed, *moved, *coverage, *inputs.rows.report.lines())
    PartialState().wait_for_everyone()

    with signals, _ending_together(), tracker, _out_of_memory_advised(trainer):
        watch(trainer, args.ddp_timeout, on_failure=lambda: tracker.finish("failed"))
        trainer.train(resume_from_checkpoint=resume.path)
        _finish(trainer, record)
    if args.push_to_hub:
        with without_pickled_arguments():
            trainer.push_to_hub(dataset_name=script.dataset_name)


def training_defaults(cls: type) -> dict[str, Any]:
    """QLoRA's defaults for the fields of ``cls`` whose default is still upstream's, not the recipe's own."""

    def declares(field: str) -> str:
        owner = next((base for base in cls.__mro__ if field in vars(base).get("__annotations__", {})), cls)
        return owner.__module__.partition(".")[0]

    return {field: value for field, value in resolve.DEFAULTS.items() if declares(field) in _UPSTREAM}


def _own_arguments(args: Any) -> dict[str, Any]:
    """Training arguments that are never the user's to decide, and are not recorded.

    The hub token moves to where huggingface_hub looks for it: checkpoints store the arguments. The Trainer's filter
    logs a loss that is not finite as 0.0, and reads each loss back from the device.
    """
    if args.hub_token is not None:
        os.environ["HF_TOKEN"] = args.hub_token
    return {"hub_token": None, "logging_nan_inf_filter": False}


def _require_usable(output_dir: str, resume: Resume, overwrite: bool) -> None:
    """Raise on every rank if the run may not write into ``output_dir``."""
    if (problem := distributed.agree(resume.problem(output_dir, overwrite=overwrite))) is not None:
        raise UserError(problem, option="output_dir")


def _prepare(
    recipe: Recipe, script: Any, args: Any, plugin: QLoRAPlugin, mixture: Any, decisions: Decisions
) -> Inputs:
    """Read the tokenizer and the rows, and take the fingerprints of what the options only name."""
    with distributed.on_every_rank("preparing the data"):
        tokenizer, added_token_ids = loading.load_tokenizer(plugin, decisions, args)
        rows = data.load(script, mixture, args, recipe.data, tokenizer, added_token_ids)
        sha = quantization.fingerprint(decisions.base, decisions.revision)
        fingerprints = {
            "data": rows.report.as_dict()["sha"],
            "base": sha,
            "chat_template": manifest.text_hash(tokenizer.chat_template),
        }
        base = {"name": decisions.base, "revision": decisions.revision, "sha": sha}
        return Inputs(rows, base, fingerprints)


def _record(name: str, settings: Settings, resume: Resume) -> RunRecord:
    record = RunRecord(settings["output_dir"], recipe=name)
    if resume.manifest is not None:
        record.update(run_id=resume.manifest.run_id, resumed_from=resume.path)
        say(*changes.other_versions(resume.manifest, record["versions"]))
    return record


def _conduct(
    script: Any, settings: Settings, inputs: Inputs, resume: Resume, tracker: Tracker, signals: Signals
) -> Conduct:
    return Conduct(
        tracker=tracker,
        signals=signals,
        config=settings.resolved(),
        inputs=inputs.fingerprints,
        checkpoint=Path(resume.path) if resume.path is not None else None,
        manifest=resume.manifest,
        on_nonfinite=script.on_nonfinite,
        on_oom=script.on_oom,
    )


def _claim(output_dir: str, resume: Resume, overwrite: bool) -> list[str]:
    """Make the output directory this run's, on rank 0; return lines to print about what was moved."""
    if not PartialState().is_main_process:
        return []
    moved = claim(output_dir, overwrite=overwrite)
    lines = [] if moved is None else [f"the earlier run in {output_dir} is now in {moved}"]
    return [*lines, *resume.prepare(output_dir)]


def _describe(
    record: RunRecord, settings: Settings, inputs: Inputs, decisions: Decisions, trainer: Trainer
) -> None:
    """Enter into ``record`` what is known before the first step."""
    say(trainer.report.fusion.line(), error=True)
    strategy = decisions.strategy
    record.update(
        config=settings.resolved(),
        base={**inputs.base, **trainer.report.coverage.as_dict()},
        data=inputs.rows.report.as_dict(),
        fast=trainer.report.fusion.as_dict(),
        strategy={**strategy.as_dict(), "devices": distributed.gather(strategy.device)},
    )
    if decisions.session:
        record.update(micro_batches=[{"from_step": trainer.conduct.manifest.step + 1, **decisions.session}])


@contextmanager
def _ending_together() -> Iterator[None]:
    """Have ranks that stopped leave together: a launcher ends all of them as soon as one has ended."""
    try:
        yield
    except Stopped:
        PartialState().wait_for_everyone()
        raise


@contextmanager
def _out_of_memory_advised(trainer: Trainer) -> Iterator[None]:
    """Add to an out-of-memory error the step, the batch and what to change; the run still ends by it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        step = trainer.state.global_step + 1
        raise torch.OutOfMemoryError(advice(trainer.args, step, str(error))) from error


def _finish(trainer: Trainer, record: RunRecord) -> None:
    """Evaluate once more where the last step was not, and write the final weights."""
    if trainer.eval_dataset is not None and not _evaluated_last(trainer):
        trainer.evaluate()
    output = trainer.args.output_dir
    files = save_final(trainer, output, distributed.gathered_adapters(trainer.model))
    record.update(files=manifest.listing(Path(output), files))
    if reasons := fast.fell_back(trainer.model):
        record.update(fast={"fell_back": reasons})
    if trainer.skipped_steps:
        record.update(skipped_steps=trainer.skipped_steps)


def _evaluated_last(trainer: Trainer) -> bool:
    """Whether the last step of the run has an evaluation in the log."""
    rows = [row for row in trainer.state.log_history if any(key.startswith("eval_") for key in row)]
    return bool(rows) and rows[-1]["step"] == trainer.state.global_step and trainer.state.global_step > 0


def _quieten() -> None:
    """Silence upstream's progress bars and deprecation notices: this run prints its own lines."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
