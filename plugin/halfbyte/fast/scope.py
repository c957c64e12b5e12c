"""Which parts of the fast step a trainer may use: decided once, from its class."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from transformers import Trainer
from trl import DPOTrainer, SFTTrainer

PARTS = frozenset({"linears", "layers", "head", "padding_free"})
_DPO_STEP = ("_compute_loss", "compute_ref_log_probs", "_precompute_ref_logps")
_MODEL_PARTS = frozenset({"linears", "layers"})


@dataclass(frozen=True)
class Scope:
    """What of a training step may be fused.

    ``parts`` is a subset of :data:`PARTS`; the default are the parts that no trainer needs to know of. ``sides`` is
    the number of sequences that one row brings to one forward: 1 for SFT, 2 for preference pairs. ``ruled_out`` says
    of ``parts`` why a trainer's options rule them out.
    """

    parts: frozenset[str] = _MODEL_PARTS
    sides: int = 1
    ruled_out: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.parts <= PARTS, self.parts - PARTS
        assert self.sides >= 1, self.sides


def scope(trainer_cls: type[Trainer]) -> Scope:
    """Return what of a step of ``trainer_cls`` may be fused.

    The chunked head and padding-free batches replace parts of TRL's SFT and DPO steps; of DPO only where a subclass has
    not replaced the step itself. All other trainers count as preference trainers, which run chosen and rejected
    sequences in one forward.
    """
    if issubclass(trainer_cls, SFTTrainer):
        return Scope(PARTS)
    if keeps(trainer_cls, DPOTrainer, _DPO_STEP):
        return Scope(PARTS, sides=2)
    return Scope(sides=2)


def keeps(cls: type, base: type, methods: Iterable[str]) -> bool:
    """Whether ``cls`` is a ``base`` that has replaced none of these ``methods``."""
    return issubclass(cls, base) and all(getattr(cls, name) is getattr(base, name) for name in methods)
