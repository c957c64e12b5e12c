"""What would make a run smaller: each change by itself, the cheapest first, with the memory that it leads to."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from halfbyte import memory
from halfbyte.data.lengths import Lengths
from halfbyte.memory import Memory, Place
from halfbyte.plan.target import Target
from halfbyte.trainer.workload import workload_of

_LEAST_LENGTH = 256
_PAGED_8BIT = "paged_adamw_8bit"


@dataclass(frozen=True)
class Change:
    """What to write, what it costs, and the bytes that one rank then holds at its peak."""

    write: str
    cost: str
    total: int
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class _State:
    """The run as it would be after some changes."""

    args: Any
    level: int | None
    place: Place
    lengths: Lengths | None


def changes(trainer: Any, token_budget: int | None, target: Target) -> list[Change]:
    """Return what makes the run of ``trainer`` smaller on ``target``, up to the first change that suffices by itself.

    Where none does, the last entry is all of them together.
    """
    start = _State(
        trainer.args,
        trainer.report.fusion.level,
        Place(strategy=target.strategy, world_size=target.ranks, device=target.device),
        Lengths.of(trainer.train_dataset, trainer.args),
    )
    before, found, together = _total(trainer, token_budget, start).total, [], start
    for write, cost, change in _candidates(trainer, target):
        after = _total(trainer, token_budget, change(start)).total
        if after >= before:
            continue
        found.append(Change(write, cost, after, after <= target.capacity))
        if after <= target.capacity:
            return found
        together = change(together)
    if len(found) > 1:
        total = _total(trainer, token_budget, together).total
        found.append(Change("all of these", "what they cost together", total, total <= target.capacity))
    return found


def _candidates(trainer: Any, target: Target) -> Iterator[tuple[str, str, Any]]:
    args = trainer.args
    if trainer.report.fusion.level:
        yield (
            "memory_budget: min",
            "everything is recomputed in the backward: the same numbers, slower",
            lambda state: replace(state, level=0),
        )
    if not args.gradient_checkpointing:
        yield (
            "gradient_checkpointing: true",
            "activations are recomputed: the same numbers, slower",
            lambda state: replace(_with(state, gradient_checkpointing=True), level=0),
        )
    size = args.per_device_train_batch_size
    while size > 1:
        size = -(-size // 2)
        accumulation = args.gradient_accumulation_steps * args.per_device_train_batch_size // size
        yield (
            f"per_device_train_batch_size: {size}, gradient_accumulation_steps: {accumulation}",
            "the same training in smaller pieces",
            lambda state, size=size, accumulation=accumulation: _with(
                state, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
            ),
        )
    if target.device == "cuda" and not str(getattr(args.optim, "value", args.optim)).endswith("8bit"):
        yield (
            f"optim: {_PAGED_8BIT}",
            "the optimizer's state in 8 bits",
            lambda state: _with(state, optim=_PAGED_8BIT),
        )
    length = getattr(args, "max_length", None)
    while length is not None and length // 2 >= _LEAST_LENGTH:
        length //= 2
        yield (
            f"max_length: {length}",
            f"other training: {_share_beyond(trainer, length)} of the rows are cut",
            lambda state, length=length: _shorter(state, length),
        )
    if target.strategy in ("single", "ddp"):
        for ranks in (2, 4, 8):
            if ranks >= target.ranks:
                yield (
                    f"accelerate launch --config_file launch/fsdp2.yaml --num_processes {ranks}",
                    f"{ranks} devices hold one base between them",
                    lambda state, ranks=ranks: replace(
                        state, place=replace(state.place, strategy="fsdp2", world_size=ranks)
                    ),
                )


def _total(trainer: Any, token_budget: int | None, state: _State) -> Memory:
    report, model = trainer.report, trainer.model
    workload = workload_of(
        state.args,
        model,
        state.lengths,
        report.fusion,
        report.workload.sides,
        token_budget,
        state.place,
    )
    return memory.predict(model, workload, state.level)


def _with(state: _State, **values: Any) -> _State:
    args = copy.copy(state.args)
    for name, value in values.items():
        setattr(args, name, value)
    return replace(state, args=args)


def _shorter(state: _State, length: int) -> _State:
    lengths = state.lengths
    if lengths is not None:
        sides = tuple(np.minimum(each, length) for each in lengths.sides)
        lengths = replace(lengths, sides=sides, common=np.minimum(lengths.common, length))
    return replace(_with(state, max_length=length), lengths=lengths)


def _share_beyond(trainer: Any, length: int) -> str:
    lengths = Lengths.of(trainer.train_dataset, trainer.args)
    if lengths is None:
        return "some"
    return f"{(np.maximum.reduce(lengths.sides) > length).mean():.0%}"
