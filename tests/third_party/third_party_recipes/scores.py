"""A reward model: one score a sequence, trained on pairs of a chosen and a rejected answer."""

from dataclasses import dataclass, field

from trl import RewardConfig, RewardTrainer

from halfbyte import Recipe
from halfbyte.data import PreferencePairs
from halfbyte.task import SEQUENCE_CLASSIFICATION
from halfbyte.tracking.figures import TRAINING, TRAINING_PLOTS, Figure, Figures, Plot


@dataclass
class ScoresConfig(RewardConfig):
    learning_rate: float = field(default=1e-2, metadata={"help": "The initial learning rate."})


recipe = Recipe(
    config=ScoresConfig,
    trainer=RewardTrainer,
    task=SEQUENCE_CLASSIFICATION,
    data=PreferencePairs,
    figures=Figures(
        (
            *TRAINING,
            Figure("accuracy", "accuracy", ".3f", compared=True),
            Figure("margin", "margin", compared=True),
            Figure("mean_reward", "score", logged=False, compared=True),
        ),
        (
            *TRAINING_PLOTS,
            Plot("accuracy", "Preference accuracy", "share of pairs", ("accuracy",), (0, 1), chance=0.5),
            Plot("scores", "Scores of both sides", "score", ("min_reward", "mean_reward", "max_reward")),
        ),
        settings=("center_rewards_coefficient",),
    ),
    summary="A reward model from preference pairs",
)
