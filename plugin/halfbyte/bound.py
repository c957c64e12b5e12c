"""A recipe's trainer, built as one run was decided: over the rows' own tokenizer, with their tokens counted."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import Trainer

from halfbyte import adapters, data
from halfbyte.assembly import assemble
from halfbyte.data import RunData
from halfbyte.data.batching import micro_batches
from halfbyte.errors import UserError
from halfbyte.loading import Loaded
from halfbyte.options import Options
from halfbyte.plugin import QLoRAPlugin
from halfbyte.recipe import Recipe
from halfbyte.resolve import Decisions
from halfbyte.trainer.base import Conduct
from halfbyte.trainer.compose import LIBRARY, run_mixins


@dataclass(frozen=True)
class Planned:
    """A model without weights in the place of one to load, and the bytes that a step may take beside it.

    ``few`` rows need not train an end token, as all of a run's must between them.
    """

    loaded: Loaded
    available: int | None
    few: bool = False


def build_trainer(
    name: str,
    recipe: Recipe,
    options: Options,
    decisions: Decisions,
    rows: RunData,
    conduct: Conduct | None,
    planned: Planned | None = None,
) -> Trainer:
    """The recipe's trainer; what upstream refuses while it is constructed is an error in the configuration.

    Over a ``planned`` model, without ``conduct``, it is there to be asked and not to train.
    """
    args, bound = options.args, RunPlugin(options.plugin, recipe, decisions, rows, conduct, planned)
    try:
        if recipe.build is not None:
            trainer = recipe.build(args, bound, rows)
        else:
            assert recipe.trainer is not None
            trainer = bound.trainer(
                recipe.trainer, args=args, train_dataset=rows.train, eval_dataset=rows.eval
            )
    except UserError:
        raise
    except (ValueError, NotImplementedError, ImportError, ConnectionError) as error:
        raise options.settings.refusal(error, name) from error
    if getattr(trainer, "conduct", None) is not conduct:
        raise UserError(f"the recipe {name!r} must build its trainer with `plugin.trainer(...)`")
    if recipe.data is not None and not (planned is not None and planned.few):
        data.check_labels(trainer, rows.report)
        _check_batches(trainer)
    if conduct is not None and conduct.checkpoint is not None and options.plugin.use_peft:
        adapters.check_checkpoint(trainer.model, str(conduct.checkpoint))
    return trainer


def _check_batches(trainer: Trainer) -> None:
    """Raise :class:`UserError` for a run whose every batch would be its last, and dropped."""
    if isinstance(rows := trainer.train_dataset, Dataset):
        args = trainer.args
        micro_batches(
            len(rows),
            args.per_device_train_batch_size,
            trainer.report.workload.world_size,
            drop_last=args.dataloader_drop_last,
        )


class RunPlugin(QLoRAPlugin):
    """The plugin that a recipe's ``build`` receives: its trainer is the run's, over the rows' own tokenizer."""

    def __init__(
        self,
        plugin: QLoRAPlugin,
        recipe: Recipe,
        decisions: Decisions,
        rows: RunData,
        conduct: Conduct | None,
        planned: Planned | None = None,
    ) -> None:
        self.__dict__.update(vars(plugin))
        self._recipe, self._decisions, self._rows = recipe, decisions, rows
        self._conduct, self._planned = conduct, planned

    def trainer(self, trainer_cls: type[Trainer], *, args: Any, **kwargs: Any) -> Trainer:
        """Build ``trainer_cls`` as the run was decided; its rows are counted."""
        tokenizer = kwargs.pop("processing_class", None) or self._rows.tokenizer
        kwargs.pop("added_token_ids", None)
        kwargs.pop("model", None)
        return assemble(
            self,
            data.counted(trainer_cls, self._rows.report),
            self._decisions,
            args,
            LIBRARY if self._conduct is None else run_mixins(self._conduct),
            tokenizer,
            self._rows.added_token_ids,
            conduct=self._conduct,
            loaded=self._planned.loaded if self._planned is not None else None,
            available=self._planned.available if self._planned is not None else None,
            parts=self._recipe.fast,
            sides=self._recipe.data.sides if self._recipe.data is not None else None,
            **kwargs,
        )
