"""A run up to its first step, without weights: its own settings, rows and trainer, over a model on meta."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from halfbyte import adapters, data, distributed, fast, loading, memory, resolve
from halfbyte.bound import Planned, build_trainer
from halfbyte.config import Settings
from halfbyte.data import OtherRowsError, RunData
from halfbyte.data.sample import Sample, number
from halfbyte.distributed import launcher
from halfbyte.errors import UserError
from halfbyte.loading import Loaded
from halfbyte.options import Options
from halfbyte.plan.target import Target, find
from halfbyte.plugin import QLoRAPlugin
from halfbyte.recipe import Recipe, recipes_for
from halfbyte.resolve import Decisions
from halfbyte.run import read
from halfbyte.trainer.build import with_values


@dataclass
class Rehearsal:
    """What a run would be on ``target``: settings read, decisions taken, and a model without weights.

    Rows and trainers are made from it, for all rows or for some.
    """

    name: str
    recipe: Recipe
    target: Target
    options: Options
    decisions: Decisions
    tokenizer: Any
    added_token_ids: list[int]
    loaded: Loaded

    @classmethod
    def of(
        cls, name: str, recipe: Recipe, argv: list[str], gpu: str | None = None, launch: Path | None = None
    ) -> "Rehearsal":
        """Read and decide as :func:`halfbyte.run.main` does, on the devices that ``gpu`` and ``launch`` name.

        Raises :class:`UserError` for what a run refuses.
        """
        settings = read(name, recipe, argv)
        if launcher.requested().processes > 1:
            raise UserError("a plan is made in one process; name the launch file with --launch")
        try:
            target = find(gpu, launch, use_cpu=bool(settings["use_cpu"]))
            if target.device == "cuda" and not torch.cuda.is_available():
                settings = _as_on_a_gpu(settings, name, recipe, argv)
            settings.check(QLoRAPlugin)
            resolve.join(settings)
            decisions = resolve.for_run(settings, None, target.planned)
            options = _without_effects(Options.decided(settings, decisions))
            tokenizer, added = loading.load_tokenizer(options.plugin, decisions, options.args)
            loaded = loading.planned(
                options.plugin,
                decisions,
                trust_remote_code=getattr(options.args, "trust_remote_code", False),
                tokenizer=tokenizer,
                added_token_ids=added,
                model_init_kwargs=getattr(options.args, "model_init_kwargs", None),
            )
        except UserError as error:
            settings.placed(error)
            raise
        return cls(name, recipe, target, options, decisions, tokenizer, added, loaded)

    def rows(self, sample: Sample | None) -> RunData:
        """Read the rows that the run would read, or a ``sample`` of them."""
        try:
            return data.load(
                self.options.script,
                self.options.mixture,
                self.options.args,
                self.recipe.data,
                self.tokenizer,
                self.added_token_ids,
                sample,
            )
        except UserError as error:
            if isinstance(error, OtherRowsError):
                error.what += recipes_for(error.columns, error.first)
            self.options.settings.placed(error)
            raise

    def trainer(self, rows: RunData, *, few: bool = False) -> Trainer:
        """Build the run's trainer over ``rows``, or a ``few``: what it prepares, fuses and chooses the run would."""
        fast.unfuse(self.loaded.model)
        # TRL adds a frozen copy of the adapter, once: it may be there from the trainer built before this one.
        adapters.drop_reference_copy(self.loaded.model)
        planned = Planned(self.loaded, self._available(), few)
        try:
            return build_trainer(self.name, self.recipe, self.options, self.decisions, rows, None, planned)
        except UserError as error:
            split = rows.report.split(error.split or "")
            if split is not None and error.row is not None:
                error.row = number(split.places, error.row)
            self.options.settings.placed(error)
            raise

    def _available(self) -> int:
        """What a step may take beside the model there, as a run counts it."""
        share = self.target.ranks if self.target.strategy in distributed.SHARDED else 1
        held = memory.weights(self.loaded.model)
        return int(memory.SHARE[self.target.device] * (self.target.capacity - held.held_by(share)))


def _as_on_a_gpu(settings: Settings, name: str, recipe: Recipe, argv: list[str]) -> Settings:
    """The settings of a run on a GPU, where there is none: what only it could take here, it is not asked about."""
    if not {"dtype", "bf16", "fp16"} & settings.given.keys():
        # What a run chooses on a GPU of compute capability 8.0 or above.
        settings = read(name, recipe, [*argv, "--dtype", "bfloat16"])
    # transformers refuses bf16 without a GPU in sight, unless it is for the CPU.
    return settings.with_values(tf32=None, use_cpu=True)


def _without_effects(options: Options) -> Options:
    """The options of a trainer that is not to train: constructing it makes no repository and no directory.

    Nor does it ask for a GPU, with float16's gradient scaler or activations that go to the host and back.
    """
    values = {"push_to_hub": False, "output_dir": tempfile.gettempdir(), "activation_offloading": False}
    if not torch.cuda.is_available():
        values |= {"fp16": False, "mixed_precision": "bf16" if options.args.bf16 else "no"}
    return replace(options, args=with_values(options.args, values))
