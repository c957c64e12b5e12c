"""One run, top to bottom: settings, decisions, data, trainer, train, finish.

Everything that can fail on invalid input fails before the output directory is touched.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from datasets.config import HF_DATASETS_CACHE
from transformers import Trainer
from transformers.utils import logging as transformers_logging
from trl import DatasetMixtureConfig

from halfbyte import adapters, config, data, distributed, fast, loading, quantization, resolve
from halfbyte.bound import build_trainer
from halfbyte.checkpoint import changes, manifest
from halfbyte.checkpoint.held import held
from halfbyte.checkpoint.output import claim, left_as_it_was, save_final
from halfbyte.checkpoint.resume import Resume, find
from halfbyte.checkpoint.space import explain_full_disk
from halfbyte.config import RunArguments, Settings
from halfbyte.data import OtherRowsError, RunData
from halfbyte.errors import Halted, Stopped, UserError
from halfbyte.options import Options
from halfbyte.plugin import QLoRAPlugin
from halfbyte.recipe import Recipe, recipes_for
from halfbyte.resilience.memory import advice, advised
from halfbyte.resilience.signals import Signals, stops_raised
from halfbyte.resilience.watch import watch
from halfbyte.resolve import Decisions
from halfbyte.terminal.wording import say
from halfbyte.tracking import RunRecord, Tracker, again_command, next_command, resume_command
from halfbyte.trainer.base import Conduct, Sampling

_UPSTREAM = ("trl", "transformers")


@dataclass(frozen=True)
class Inputs:
    """What a run reads: the rows with their tokenizer, the base, and a fingerprint of each."""

    rows: RunData
    base: Mapping[str, Any]
    fingerprints: Mapping[str, Any]


def main(name: str, recipe: Recipe, argv: list[str], written: config.Written | None = None) -> int:
    """Train ``recipe`` with the settings of ``argv``, which is ``written`` once collected; return the exit code."""
    settings = read(name, recipe, argv if written is None else written)
    try:
        quieten()
        settings.check(QLoRAPlugin)  # before what depends on the machine
        resolve.join(settings)
        output = settings["output_dir"] or "trainer_output"  # upstream's default
        with stops_raised(), held(output), left_as_it_was(output), _full_disk_explained(output):
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
    settings = config.read(
        written,
        (RunArguments, recipe.config, QLoRAPlugin, DatasetMixtureConfig),
        prog=f"halfbyte {name}",
        summary=recipe.summary,
        defaults={**training_defaults(recipe.config), "lora_task_type": recipe.task.peft_type},
    )
    paths = {key: settings[key] for key in ("output_dir", "resume_from_checkpoint")}
    return settings.with_values(**{key: os.path.expanduser(path) for key, path in paths.items() if path})


def train(name: str, recipe: Recipe, argv: list[str], settings: Settings) -> None:
    """Run ``recipe`` with ``settings`` from the first decision to the last file; on every rank."""
    resume = find(settings["output_dir"], settings["resume_from_checkpoint"])
    decisions = resolve.for_run(settings, resume.manifest)
    options = Options.decided(settings, decisions)
    output = options.args.output_dir
    overwrite = options.script.overwrite_output_dir and resume.path is None
    resume.require_usable(output, overwrite=overwrite, inputs=options.paths(decisions))
    allowed = _allowed_changes(options)
    strategy = decisions.strategy.name
    changed = resume.changes(_identity(options, decisions), allowed, strategy)
    inputs = _read(recipe, options, decisions)
    changed += resume.changes(inputs.fingerprints, allowed, strategy)

    tracker = _tracker(name, recipe, argv, options, decisions, resume)
    signals = Signals(tracker.abandon)
    conduct = _conduct(options, inputs, resume, tracker, signals)
    with distributed.on_every_rank("building the trainer"):
        trainer = build_trainer(name, recipe, options, decisions, inputs.rows, conduct)
    tracker.record.update(**_described(options, inputs, decisions, trainer))
    moved = claim(output, resume, overwrite=overwrite)
    say(
        *decisions.lines,
        *adapters.lines(tracker.record["lineage"]),
        *resume.lines,
        *changed,
        *moved,
        *_found(options, inputs, trainer),
    )

    with signals, _ending_together(), tracker, advised(lambda reason: _advice(trainer, reason)):
        watch(trainer, options.args.ddp_timeout, on_failure=tracker.fail)
        trainer.train(resume_from_checkpoint=resume.path)
        _finish(trainer, tracker.record)
    _push(trainer, options)


def training_defaults(cls: type) -> dict[str, Any]:
    """QLoRA's defaults for the fields of ``cls`` whose default is still upstream's, not the recipe's own."""

    def declares(field: str) -> str:
        owner = next((base for base in cls.__mro__ if field in vars(base).get("__annotations__", {})), cls)
        return owner.__module__.partition(".")[0]

    return {field: value for field, value in resolve.DEFAULTS.items() if declares(field) in _UPSTREAM}


def _allowed_changes(options: Options) -> list[str] | None:
    allowed = options.script.allow_config_change
    changes.check_keys(allowed, options.settings.resolved())
    return allowed


def _identity(options: Options, decisions: Decisions) -> dict[str, Any]:
    """The options that a resume compares, and the number of processes."""
    return {**options.settings.resolved(), "world_size": decisions.strategy.world_size}


def _read(recipe: Recipe, options: Options, decisions: Decisions) -> Inputs:
    """Read the tokenizer and the rows, and take the fingerprints of what the options only name."""
    with distributed.on_every_rank("preparing the data"):
        tokenizer, added_token_ids = loading.load_tokenizer(options.plugin, decisions, options.args)
        try:
            rows = data.load(
                options.script, options.mixture, options.args, recipe.data, tokenizer, added_token_ids
            )
        except OtherRowsError as error:
            error.what += recipes_for(error.columns, error.first)
            raise
        sha = quantization.fingerprint(decisions.base, decisions.revision)
        fingerprints = {
            "data": rows.report.as_dict()["sha"],
            "base": sha,
            "chat_template": manifest.text_hash(tokenizer.chat_template),
        }
        base = {"name": decisions.base, "revision": decisions.revision, "sha": sha}
        return Inputs(rows, base, fingerprints)


def _tracker(
    name: str, recipe: Recipe, argv: list[str], options: Options, decisions: Decisions, resume: Resume
) -> Tracker:
    """The tracker of this run; a resumed one continues under the id of the run before it."""
    record = RunRecord(options.args.output_dir, recipe=name)
    if resume.manifest is not None:
        before = resume.manifest
        record.update(run_id=before.run_id, resumed_from=resume.path, wandb_id=before.wandb_id)
        say(*changes.other_versions(resume.manifest, record["versions"]))
    adapter = options.plugin.use_peft
    return Tracker(
        record,
        main=PartialState().is_main_process,
        bar=not options.args.disable_tqdm,
        figures=recipe.figures,
        next_command=next_command(recipe.next, options.args.output_dir, decisions.base, adapter=adapter),
        resume_command=resume_command(name, argv),
        again_command=again_command(name, argv) if resume.path is None else None,
    )


def _conduct(options: Options, inputs: Inputs, resume: Resume, tracker: Tracker, signals: Signals) -> Conduct:
    return Conduct(
        tracker=tracker,
        signals=signals,
        config=options.settings.resolved(),
        inputs=inputs.fingerprints,
        checkpoint=Path(resume.path) if resume.path is not None else None,
        manifest=resume.manifest,
        on_nonfinite=options.script.on_nonfinite,
        on_oom=options.script.on_oom,
        samples=Sampling.of(inputs.rows.prompts, options.script),
        peak_flops=options.script.peak_flops,
    )


def _described(options: Options, inputs: Inputs, decisions: Decisions, trainer: Trainer) -> dict[str, Any]:
    """What run.json says before the first step."""
    strategy, conduct = decisions.strategy, trainer.conduct
    found = {
        "config": conduct.config,
        "base": {**inputs.base, **trainer.report.coverage.as_dict()},
        "data": inputs.rows.report.as_dict(),
        "tokenizer": adapters.describe(inputs.rows.tokenizer),
        "lineage": adapters.chain(
            decisions.adapter, options.plugin.adapter_name_or_path or options.plugin.model_name_or_path
        ),
        "fast": trainer.report.fusion.as_dict(),
        "memory": {"predicted": trainer.report.memory.as_dict()},
        **({"batching": batching.as_dict()} if (batching := trainer.report.batching) is not None else {}),
        "strategy": {**strategy.as_dict(), "devices": distributed.gather(strategy.device)},
    }
    if smaller := decisions.micro_batches:
        found["micro_batches"] = [{"from_step": conduct.manifest.step + 1, **smaller}]
    return found


def _found(options: Options, inputs: Inputs, trainer: Trainer) -> list[str]:
    """Lines about the base, the data and the step, to print before the first of them."""
    coverage = [trainer.report.coverage.line()] if options.plugin.load_in_4bit else []
    coverage.append(adapters.trained_line(trainer.model))
    experimental = [
        f"experimental: TRL may change or remove its {cls.__name__} without notice"
        for cls in type(trainer).recipe_class.__mro__
        if cls.__module__.startswith("trl.experimental.")
    ]
    return [*coverage, *inputs.rows.report.lines(), *trainer.report.lines(), *experimental[:1]]


@contextmanager
def _ending_together() -> Iterator[None]:
    """Have ranks that stopped leave together: a launcher ends all of them as soon as one has ended."""
    try:
        yield
    except Stopped:
        PartialState().wait_for_everyone()
        raise


@contextmanager
def _full_disk_explained(output_dir: str) -> Iterator[None]:
    """Turn what the system says about a full disk into which file, how much is free, and what to do."""
    try:
        yield
    except Exception as error:
        places = (output_dir, str(HF_DATASETS_CACHE), tempfile.gettempdir())
        if isinstance(error, UserError | Halted) or (told := explain_full_disk(error, *places)) is None:
            raise
        raise Halted(told) from error


def _advice(trainer: Trainer, reason: str) -> str:
    """What ran out in the step that ``trainer`` is in, and what to change."""
    batching = trainer.report.batching
    tokens = batching.tokens if batching is not None else None
    return advice(trainer.args, trainer.state.global_step + 1, reason, tokens)


def _finish(trainer: Trainer, record: RunRecord) -> None:
    """Evaluate once more where the last step was not, and write the final weights.

    Raises :class:`Halted` for a run that took no step: its adapter would be untrained.
    """
    if trainer.state.global_step == 0:
        raise Halted("no step was taken: the training data is empty once unusable rows are dropped")
    if trainer.eval_dataset is not None and not _evaluated_last(trainer):
        trainer.evaluate()
    output = trainer.args.output_dir
    files = save_final(trainer, output, distributed.gathered_adapters(trainer.model))
    record.update(files=manifest.listing(Path(output), files))
    if reasons := fast.fell_back(trainer.model):
        record.update(fast={"fell_back": reasons})
    if trainer.skipped_steps:
        record.update(skipped_steps=trainer.skipped_steps)


def _push(trainer: Trainer, options: Options) -> None:
    if options.args.push_to_hub:
        trainer.push_to_hub(dataset_name=options.script.dataset_name)


def _evaluated_last(trainer: Trainer) -> bool:
    """Whether the last step of the run has an evaluation in the log."""
    rows = [row for row in trainer.state.log_history if any(key.startswith("eval_") for key in row)]
    return bool(rows) and rows[-1]["step"] == trainer.state.global_step and trainer.state.global_step > 0


def quieten() -> None:
    """Silence upstream's progress bars and deprecation notices: this run prints its own lines."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
