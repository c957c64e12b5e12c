"""Direct preference optimization (arXiv 2305.18290): train on pairs of a chosen and a rejected answer.

Without ``adapter_name_or_path`` the reference is the base with the adapter off; with it, a frozen copy of
that adapter. Neither needs a second model.
"""

from dataclasses import dataclass, field

from trl import DPOConfig, DPOTrainer

from halfbyte.data import PreferencePairs
from halfbyte.recipe import Recipe
from halfbyte.tracking.figures import PREFERENCES


@dataclass
class DPOArguments(DPOConfig):
    """TRL's DPO options with the learning rate of its LoRA examples, and the reference by cost."""

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate."})
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the reference log-probabilities once, before training, and cache them for later runs "
            "(true), or in every step (false). Unset: once, if there is more than one epoch, or if they are cached."
        },
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "Chat template to use: a .jinja file, or a model whose template to take."},
    )


recipe = Recipe(
    config=DPOArguments,
    trainer=DPOTrainer,
    data=PreferencePairs,
    figures=PREFERENCES,
    summary="Direct preference optimization on pairs of a chosen and a rejected answer",
)
