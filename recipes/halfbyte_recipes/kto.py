"""Kahneman-Tversky optimization (arXiv 2402.01306): train on single answers, each labelled as wanted or not.

Without ``adapter_name_or_path`` the reference is the base with the adapter off; with it, a frozen copy of
that adapter. Neither needs a second model.
"""

from dataclasses import dataclass, field

from trl import KTOConfig, KTOTrainer

from halfbyte.data import UnpairedPreferences
from halfbyte.recipe import Recipe
from halfbyte.tracking.figures import LABELLED_ANSWERS


@dataclass
class KTOArguments(KTOConfig):
    """TRL's KTO options with the learning rate of its LoRA example for DPO.

    TRL's KTO example has 5e-7, that of its full training, and says that the best options are similar to DPO's.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate."})
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "Chat template to use: a .jinja file, or a model whose template to take."},
    )


recipe = Recipe(
    config=KTOArguments,
    trainer=KTOTrainer,
    data=UnpairedPreferences,
    figures=LABELLED_ANSWERS,
    summary="Kahneman-Tversky optimization on single answers, each labelled as wanted or not",
)
