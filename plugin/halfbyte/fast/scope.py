"""Which parts of the fast step a trainer may use: decided once, from its class."""

from dataclasses import dataclass

from transformers import Trainer
from trl import SFTTrainer

PARTS = frozenset({"linears", "layers", "head", "padding_free"})
_MODEL_PARTS = frozenset({"linears", "layers"})


@dataclass(frozen=True)
class Scope:
    """What of a training step may be fused.

    ``parts`` is a subset of :data:`PARTS`; the default are the parts that no trainer needs to know of. ``sides`` is
    the number of sequences that one row brings to one forward: 1 for SFT, 2 for preference pairs.
    """

    parts: frozenset[str] = _MODEL_PARTS
    sides: int = 1

    def __post_init__(self) -> None:
        assert self.parts <= PARTS, self.parts - PARTS
        assert self.sides >= 1, self.sides


def scope(trainer_cls: type[Trainer]) -> Scope:
    """Return what of a step of ``trainer_cls`` may be fused.

    The chunked head and padding-free batches replace parts of TRL's SFT step. All other trainers count as preference
    trainers, which run chosen and rejected sequences in one forward.
    """
    return Scope(PARTS) if issubclass(trainer_cls, SFTTrainer) else Scope(sides=2)
