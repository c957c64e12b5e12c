"""Run one recipe: read the configuration, build, train, finish.

Everything that can fail on what the user wrote fails before the output directory is touched.
"""

import os
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from transformers import Trainer
from transformers.utils import logging as transformers_logging
from trl import DatasetMixtureConfig

from halfbyte import arguments, config, data, distributed, fast, resolve, tracking
from halfbyte.checkpoint import changes, manifest
from halfbyte.checkpoint.output import claim, left_as_it_was, save_final
from halfbyte.checkpoint.resume import Resume, find
from halfbyte.config import RunArguments, Settings
from halfbyte.errors import Stopped, UserError
from halfbyte.plugin import QLoRAPlugin
from halfbyte.recipe import Recipe
from halfbyte.resilience import memory, signals
from halfbyte.resilience.watch import watch
from halfbyte.trainer import accumulation, exact_resume, saving
from halfbyte.trainer import finite as guards
from halfbyte.trainer.invariants import watch_invariants

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
    settings: Settings
    resolved: dict[str, Any]
    resume: Resume
    resume_command: str


def main(name: str, recipe: Recipe, argv: list[str], written: config.Written | None = None) -> int:
    """Train ``recipe`` with the settings of ``argv``, which is ``written`` once collected; return the exit code."""
    settings = config.read(
        argv if written is None else written,
        (RunArguments, recipe.config, QLoRAPlugin, DatasetMixtureConfig),
        prog=f"halfbyte {name}",
        summary=recipe.summary,
        defaults=training_defaults(recipe.config),
    )
    try:
        _run(name, recipe, argv, settings)
    except UserError as error:
        settings.placed(error)
        raise
    if torch.distributed.is_initialized():
        # Only when all went well: a rank that failed leaves without waiting for the others.
        torch.distributed.destroy_process_group()
    return 0


def _run(name: str, recipe: Recipe, argv: list[str], settings: Settings) -> None:
    _quieten()
    distributed.refuse_unsupported()
    on_cpu = bool("use_cpu" in settings.given and settings["use_cpu"])
    resolve.join_the_others(settings)
    resume = find(settings["output_dir"], settings["resume_from_checkpoint"])
    lines = resolve.decide(settings, resume.recorded)
    script, training, plugin, mixture = settings.build()
    strategy = distributed.strategy_in_force(on_cpu=on_cpu)
    _hide_hub_token(training)
    run = Run(
        name,
        recipe,
        script,
        training,
        plugin,
        mixture,
        settings,
        settings.resolved(),
        resume,
        resume_command(name, argv),
    )
    _train(run, strategy, lines)


def training_defaults(cls: type) -> dict[str, Any]:
    """QLoRA's defaults for the fields of ``cls`` whose default is still upstream's, not the recipe's own."""

    def declares(field: str) -> str:
        owner = next((base for base in cls.__mro__ if field in vars(base).get("__annotations__", {})), cls)
        return owner.__module__.partition(".")[0]

    return {field: value for field, value in arguments.DEFAULTS.items() if declares(field) in _UPSTREAM}


def _train(run: Run, strategy: distributed.Strategy, lines: list[str]) -> None:
    is_main = PartialState().is_main_process
    training, plugin = run.training, run.plugin
    resume, allowed = run.resume, run.script.allow_config_change
    changes.check_keys(allowed, run.resolved)
    overwrite = run.script.overwrite_output_dir and resume.path is None
    if (problem := distributed.agree(resume.problem(training.output_dir, overwrite=overwrite))) is not None:
        raise UserError(problem)
    lines = [*lines, *resume.lines, *_changed(run, {**run.resolved, "world_size": strategy.world_size})]
    with distributed.on_every_rank("preparing the data"):
        tokenizer, added_token_ids = plugin.tokenizer(training)
        rows = data.load(run.script, run.mixture, training, run.recipe.data, tokenizer)
        base = plugin.base_record()
        inputs = {
            "data": rows.report.as_dict()["sha"],
            "base": base["sha"],
            "chat_template": manifest.text_hash(tokenizer.chat_template),
        }
        lines = [*lines, *_changed(run, inputs)]
    plugin.recorded_level = resume.save_level(plugin.memory_budget)
    with distributed.on_every_rank("building the trainer"), left_as_it_was(training.output_dir):
        trainer = _build(run, rows, tokenizer, added_token_ids)
        if run.recipe.data is not None:
            data.check_labels(trainer, rows.report)
        if run.script.on_oom == "accumulate":
            accumulation.refuse(trainer)
    if is_main:
        moved = claim(training.output_dir, overwrite=overwrite)
        if moved is not None:
            lines = [*lines, f"the earlier run in {training.output_dir} is now in {moved}"]
        lines = [*lines, *resume.prepare(training.output_dir)]
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
    if resume.manifest is not None:
        record.update(run_id=resume.manifest.run_id, resumed_from=resume.path)
        for line in changes.other_versions(resume.manifest, record["versions"]) if is_main else ():
            print(line, flush=True)
    decided = {"save_level": plugin.fast_path.level}
    facts = saving.RunFacts(record["run_id"], run.resolved, inputs, record["versions"], decided)
    saving.keep(trainer, facts)
    exact_resume.make_exact(trainer, Path(resume.path) if resume.path is not None else None)
    tracker = tracking.track(trainer, record)
    watch_invariants(trainer, on_begin=lambda facts: record.update(strategy=facts))
    watch(trainer, training.ddp_timeout, on_failure=lambda: tracker.finish("failed"))
    finite = guards.guard(trainer, run.script.on_nonfinite)

    micro_batches: list[dict[str, int]] = []

    def smaller(split: dict[str, int]) -> None:
        micro_batches.append(split)
        record.update(micro_batches=micro_batches)

    accumulation.take_over(trainer, resume.manifest, run.resolved, smaller)
    if run.script.on_oom == "accumulate":
        accumulation.accumulate(trainer, smaller)

    def abandon(signum: int) -> None:
        tracker.abandon("interrupted", run.resume_command)

    with signals.stopping(trainer, abandon):
        try:
            with memory.advised(trainer):
                trainer.train(resume_from_checkpoint=resume.path)
                if trainer.eval_dataset is not None and not _evaluated_last(trainer):
                    trainer.evaluate()
            files = save_final(trainer, training.output_dir, distributed.gathered_adapters(trainer.model))
            record.update(files=manifest.listing(Path(training.output_dir), files))
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | Stopped)
            tracker.finish("interrupted" if interrupted else "failed", run.resume_command)
            if isinstance(error, Stopped):
                PartialState().wait_for_everyone()  # a launcher ends all ranks as soon as one has ended
            raise
    if reasons := fast.fell_back(trainer.model):
        record.update(fast={"fell_back": reasons})
    if finite.skipped:
        record.update(skipped_steps=finite.skipped)
    tracker.finish("completed", _next_command(run))
    if training.push_to_hub:
        with saving.without_pickled_arguments():
            trainer.push_to_hub(dataset_name=run.script.dataset_name)


def resume_command(name: str, argv: list[str]) -> str:
    """The command that continues this run from its newest checkpoint, without the secrets of ``argv``."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("--resume_from_checkpoint", "--overwrite_output_dir"):
            if not equals and option == "--resume_from_checkpoint":
                next(words, None)
            continue
        if equals:
            word = f"{option}={tracking.redact(value, option)}"
        elif kept and kept[-1].startswith("--") and not word.startswith("--"):
            word = str(tracking.redact(word, kept[-1]))
        kept.append(word)
    launcher = distributed.launch_command([name, *argv])
    return shlex.join([*(launcher or ["halfbyte"]), name, *kept, "--resume_from_checkpoint", "auto"])


def _changed(run: Run, now: Mapping[str, Any]) -> list[str]:
    """Refuse what is not as it was when the checkpoint was written, unless the user allows it."""
    resume = run.resume
    if resume.manifest is None:
        return []
    return changes.refuse(resume.manifest, now, run.script.allow_config_change, str(resume.path))


def _build(run: Run, rows: data.RunData, tokenizer: Any, added_token_ids: list[int]) -> Trainer:
    """The recipe's trainer; what upstream refuses while it is made is the user's to mend."""
    recipe = run.recipe
    try:
        if recipe.build is not None:
            return recipe.build(run.training, run.plugin, rows)
        assert recipe.trainer is not None
        return run.plugin.trainer(
            data.counted(recipe.trainer, rows.report),
            args=run.training,
            train_dataset=rows.train,
            eval_dataset=rows.eval,
            processing_class=tokenizer,
            added_token_ids=added_token_ids,
        )
    except UserError:
        raise
    except (ValueError, NotImplementedError, ImportError, ConnectionError) as error:
        raise run.settings.refusal(error, run.name) from error


def _evaluated_last(trainer: Trainer) -> bool:
    """Whether the last step of the run has an evaluation in the log."""
    rows = [row for row in trainer.state.log_history if any(key.startswith("eval_") for key in row)]
    return bool(rows) and rows[-1]["step"] == trainer.state.global_step and trainer.state.global_step > 0


def _next_command(run: Run) -> str | None:
    if run.recipe.next is None:
        return None
    option = "adapter_name_or_path" if run.plugin.use_peft else "model_name_or_path"
    return run.recipe.next.format(
        output_dir=run.training.output_dir,
        model=run.plugin.resolve()[0],
        start=f"--{option} {run.training.output_dir}",
    )


def _hide_hub_token(training: Any) -> None:
    """Move the token to where huggingface_hub looks for it: checkpoints pickle the arguments as they are."""
    if training.hub_token is not None:
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None


def _quieten() -> None:
    """Silence upstream's progress bars and deprecation notices: this run prints its own lines."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
