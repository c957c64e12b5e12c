"""Odds ratio preference optimization (arXiv 2403.07691): learn the chosen answer, and prefer it to the rejected one.

One stage without a reference model. The trainer is experimental in TRL.
"""

from dataclasses import dataclass, field

from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from halfbyte.data import PreferencePairs
from halfbyte.recipe import Recipe
from halfbyte.tracking.figures import WITHOUT_REFERENCE


@dataclass
class ORPOArguments(ORPOConfig):
    """TRL's ORPO options with the learning rate of its LoRA examples."""

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate."})
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "Chat template to use: a .jinja file, or a model whose template to take."},
    )


recipe = Recipe(
    config=ORPOArguments,
    trainer=ORPOTrainer,
    data=PreferencePairs,
    figures=WITHOUT_REFERENCE,
    summary="Odds ratio preference optimization, without a reference model (experimental in TRL)",
)
