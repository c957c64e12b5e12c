"""A reward model: one score a sequence, trained so that chosen answers score above rejected ones (Bradley-Terry).

The base gets a head of one output, which is trained and saved with the adapter, in float32.
"""

from dataclasses import dataclass, field

from trl import RewardConfig, RewardTrainer

from halfbyte.data import ScoredPairs
from halfbyte.recipe import Recipe
from halfbyte.task import SEQUENCE_CLASSIFICATION
from halfbyte.tracking.figures import SCORES


@dataclass
class RewardArguments(RewardConfig):
    """TRL's options for reward models with the learning rate of its LoRA examples."""

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate."})


recipe = Recipe(
    config=RewardArguments,
    trainer=RewardTrainer,
    task=SEQUENCE_CLASSIFICATION,
    data=ScoredPairs,
    figures=SCORES,
    summary="A reward model: one score a sequence, from pairs of a chosen and a rejected answer",
)
