"""A recipe's trainer, built as one run was decided: over the rows' own tokenizer, with their tokens counted."""

from typing import Any

from transformers import Trainer

from halfbyte import adapters, data
from halfbyte.assembly import assemble
from halfbyte.data import RunData
from halfbyte.errors import UserError
from halfbyte.options import Options
from halfbyte.plugin import QLoRAPlugin
from halfbyte.recipe import Recipe
from halfbyte.resolve import Decisions
from halfbyte.trainer.base import Conduct
from halfbyte.trainer.compose import run_mixins


def build_trainer(
    name: str,
    recipe: Recipe,
    options: Options,
    decisions: Decisions,
    rows: RunData,
    conduct: Conduct,
) -> Trainer:
    """The recipe's trainer; what upstream refuses while it is constructed is an error in the configuration."""
    args, bound = options.args, RunPlugin(options.plugin, recipe, decisions, rows, conduct)
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
    if recipe.data is not None:
        data.check_labels(trainer, rows.report)
    if conduct.checkpoint is not None and options.plugin.use_peft:
        adapters.check_checkpoint(trainer.model, str(conduct.checkpoint))
    return trainer


class RunPlugin(QLoRAPlugin):
    """The plugin that a recipe's ``build`` receives: its trainer is the run's, over the rows' own tokenizer."""

    def __init__(
        self,
        plugin: QLoRAPlugin,
        recipe: Recipe,
        decisions: Decisions,
        rows: RunData,
        conduct: Conduct,
    ) -> None:
        self.__dict__.update(vars(plugin))
        self._recipe, self._decisions, self._rows, self._conduct = recipe, decisions, rows, conduct

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
            run_mixins(self._conduct),
            tokenizer,
            self._rows.added_token_ids,
            conduct=self._conduct,
            parts=self._recipe.fast,
            sides=self._recipe.data.sides if self._recipe.data is not None else None,
            **kwargs,
        )
