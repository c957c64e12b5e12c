"""Kahneman-Tversky optimization (arXiv 2402.01306): single answers, each labelled as wanted or not."""

from dataclasses import dataclass, field

from trl import KTOConfig, KTOTrainer

from halfbyte import Recipe
from halfbyte.data import UnpairedPreferences
from halfbyte.tracking.figures import KL, KL_PLOT, MARGIN, REWARDS_PLOT, TRAINING, TRAINING_PLOTS, Figures


@dataclass
class UnpairedConfig(KTOConfig):
    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate."})


recipe = Recipe(
    config=UnpairedConfig,
    trainer=KTOTrainer,
    data=UnpairedPreferences,
    figures=Figures(
        (*TRAINING, KL, MARGIN),
        (*TRAINING_PLOTS, KL_PLOT, REWARDS_PLOT),
        settings=("beta", "loss_type", "desirable_weight", "undesirable_weight"),
    ),
    summary="Kahneman-Tversky optimization on single labelled answers",
)
