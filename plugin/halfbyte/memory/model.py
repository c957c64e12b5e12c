"""The parts of a rank's memory at the peak of a step, in bytes.

What is resident (:mod:`halfbyte.memory.resident`) stays for the whole run; what a step adds
(:mod:`halfbyte.memory.step`) is largest when the forward has just ended: every layer keeps what its backward reads,
and either the LM head scores its last chunk or the last layer runs its backward. Where a step is small, the peak is
the optimizer's instead, with all gradients and no activation, or that of an evaluation with larger batches.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from halfbyte import distributed
from halfbyte.memory import resident, step

# Memory of a process on a CPU beside its tensors: imports, and more where a row has two sides (among it what oneDNN
# compiles for products of a second number of tokens, 0.6 MB each in bfloat16); copies of a layer's products, as a
# multiple of what they work with, by the bytes of a value; fragmentation, as a share of the working memory. Measured by
# tests/benchmarks/memory.py (oneDNN without AMX, glibc).
_IMPORTS = 36 * 2**20
_OF_PAIRS = 30 * 2**20
_COPIES = {2: 1.15, 4: 0.55}
_PIECES = 0.4
# The share of what a step adds that CUDA's allocator reserves beside it: assumed, since torch counts tensors only.
_RESERVED = 0.05


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a step runs: under which strategy, on how many ranks, on which kind of device.

    ``available`` is what a step may take on one of them beside the model, in bytes; None: what is free there now.
    """

    strategy: str = "single"
    world_size: int = 1
    device: str = "cpu"
    available: int | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one step of one rank computes, and how its state is held.

    ``tokens`` is the most that one forward has, ``longest`` that of a sequence in it; a row brings ``sides`` of them.
    ``read`` is how many of the tokens have an output that is read behind the last layer; None: all.
    ``accumulation`` is the number of micro-batches in a step, ``optim`` the optimizer's name. ``checkpointing``
    concerns layers without a save level; without ``chunked_head`` TRL's own scores the tokens. ``evaluated`` is the
    most tokens of a batch of an evaluation, ``evaluated_longest`` that of a sequence in it; 0 without one. ``in_rows``
    and ``evaluated_in_rows`` are the tokens that state mixers see of a padding-free batch, in padded rows; None: no
    others.
    """

    tokens: int
    longest: int
    optim: str
    sides: int = 1
    accumulation: int = 1
    checkpointing: bool = True
    chunked_head: bool = True
    strategy: str = "single"
    world_size: int = 1
    device: str = "cpu"
    evaluated: int = 0
    evaluated_longest: int = 0
    read: int | None = None
    in_rows: int | None = None
    evaluated_in_rows: int | None = None

    @property
    def ranks_that_share(self) -> int:
        """The number of ranks that hold one base between them."""
        return self.world_size if self.strategy in distributed.SHARDED else 1


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one rank holds at the peak of a step, in bytes; the parts add up to ``total``.

    ``pageable`` is the share of ``optimizer`` that moves to the host where the device is full, and is not added.
    ``evaluating``: the peak is not that of a step, but of an evaluation.
    """

    four_bit_weights: int
    quantization_state: int
    other_weights: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    working: int
    gathered: int
    buckets: int
    slack: int
    pageable: int = 0
    evaluating: bool = False

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts().values())

    @property
    def loaded(self) -> int:
        """What is there before the first step."""
        return self.four_bit_weights + self.quantization_state + self.other_weights + self.adapters

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part by name."""
        return {name: size for name, size in asdict(self).items() if name not in ("pageable", "evaluating")}

    def as_dict(self) -> dict[str, Any]:
        """Return the parts, the total and what can be paged out, in JSON's types."""
        return {**self.parts(), "pageable": self.pageable, "total": self.total}


def is_planned(model: nn.Module) -> bool:
    """Return whether ``model`` is on meta: without weights, there to be planned with."""
    return next(model.parameters()).is_meta


def predict(model: nn.Module, workload: Workload, level: int | None = None) -> Memory:
    """Return what a rank holds at the peak of a run of ``model``, loaded or on meta, its fused layers at ``level``.

    None stands for the level that they have. ``model`` is whole: not sharded yet. The peak is that of a step, or of an
    evaluation where that is higher.
    """
    step_ = _at_its_peak(model, workload, step.activations(model, workload, level))
    if not workload.evaluated:
        return step_
    return max(step_, _evaluating(model, workload), key=lambda each: each.total)


def by_level(model: nn.Module, workload: Workload) -> Mapping[int, Memory]:
    """Return what a step holds for every save level of the layers."""
    return {
        level: _at_its_peak(model, workload, step.activations(model, workload, level))
        for level in step.LEVELS
    }


def _at_its_peak(model: nn.Module, workload: Workload, added: step.Activations) -> Memory:
    trained = resident.weights(model).trained // workload.ranks_that_share
    # In the backward of the last layer only its own gradients are there, unless an earlier micro-batch left all.
    early = trained if workload.accumulation > 1 else trained // max(added.layers, 1)
    found = _with(model, workload, added, gradients=early)
    if added.kept + added.working + early < trained:
        return replace(found, activations=0, working=0, gradients=trained)
    return found


def _evaluating(model: nn.Module, workload: Workload) -> Memory:
    """What a rank holds in an evaluation: no gradients, the optimizer's state, and the forward of a batch."""
    found = _with(model, workload, step.evaluation(model, workload), gradients=0)
    return replace(found, evaluating=True)


def _with(model: nn.Module, workload: Workload, added: step.Activations, gradients: int) -> Memory:
    base, share = resident.weights(model), workload.ranks_that_share
    state = resident.optimizer_state(model, workload.optim) // share
    gathered = resident.gathered(model) if share > 1 else 0
    buckets = base.trained if workload.strategy == "ddp" and workload.world_size > 1 else 0
    return Memory(
        four_bit_weights=base.four_bit // share,
        quantization_state=base.quantization_state,
        other_weights=base.other // share,
        adapters=base.adapters // share,
        optimizer=state,
        gradients=gradients,
        activations=added.kept,
        working=added.working,
        gathered=gathered,
        buckets=buckets,
        slack=_slack(workload, added, step.item_size(model)),
        pageable=state if resident.is_paged(workload.optim) else 0,
    )


def _slack(workload: Workload, added: step.Activations, size: int) -> int:
    if workload.device == "cuda":
        return int(_RESERVED * (added.kept + added.working))
    copies = _COPIES.get(size, max(_COPIES.values())) * added.products
    pieces = (1 + _PIECES) * added.working
    beside = _IMPORTS + (_OF_PAIRS if workload.sides > 1 else 0)
    return beside + int(max(copies + max(added.working, added.products), pieces) - added.working)
