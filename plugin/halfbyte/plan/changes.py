"""What would make a run smaller: each change by itself, the cheapest first, with the memory that it leads to."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from halfbyte import memory
from halfbyte.data.lengths import Lengths
from halfbyte.memory import Memory, Place
from halfbyte.model_options import ModelOptions
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
    verdict: str

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
    token_budget: int | None
    evaluated: Lengths | None


@dataclass(frozen=True)
class _Candidate:
    """A change that may help; of one ``kind`` the last is the most that it can do."""

    kind: str
    write: str
    cost: str
    change: Callable[[_State], _State]


def changes(trainer: Any, options: ModelOptions, target: Target) -> list[Change]:
    """Return what makes the run of ``trainer`` smaller on ``target``, up to the first change that suffices by itself.

    Where none does, the last entry is all of them together.
    """
    start = _State(
        trainer.args,
        trainer.report.fusion.level,
        Place(strategy=target.strategy, world_size=target.ranks, device=target.device),
        trainer.report.lengths,
        options.max_tokens_per_batch,
        trainer.report.evaluated,
    )
    before, found = _held(trainer, start).total, []
    together: dict[str, _Candidate] = {}
    for candidate in _candidates(trainer, options, target, start.lengths):
        after = _held(trainer, candidate.change(start))
        if after.total >= before:
            continue
        verdict = target.verdict(after)
        found.append(Change(candidate.write, candidate.cost, after.total, verdict))
        if verdict == "fits":
            return found
        together[candidate.kind] = candidate  # the smallest batch, the shortest rows
    if len(together) > 1:
        state = start
        for candidate in together.values():
            state = candidate.change(state)
        after = _held(trainer, state)
        written = "; ".join(candidate.write for candidate in together.values())
        found.append(Change(written, "all of these together", after.total, target.verdict(after)))
    return found


def _candidates(
    trainer: Any, options: ModelOptions, target: Target, lengths: Lengths | None
) -> Iterator[_Candidate]:
    args = trainer.args
    if trainer.report.memory.evaluating:
        rows = args.per_device_eval_batch_size
        for size in _divisors(rows):
            yield _Candidate(
                "evaluation",
                f"per_device_eval_batch_size: {size}",
                "the same evaluation in smaller pieces",
                partial(_with, per_device_eval_batch_size=size),
            )
    if trainer.report.fusion.level:
        yield _Candidate(
            "level",
            "memory_budget: min",
            "everything is recomputed in the backward: the same numbers, slower",
            lambda state: replace(state, level=0),
        )
    if not args.gradient_checkpointing:
        yield _Candidate(
            "level",
            "gradient_checkpointing: true",
            "activations are recomputed: the same numbers, slower",
            lambda state: replace(_with(state, gradient_checkpointing=True), level=0),
        )
    yield from _smaller_batches(args, options.max_tokens_per_batch)
    if target.device == "cuda" and not str(getattr(args.optim, "value", args.optim)).endswith("8bit"):
        yield _Candidate(
            "optim",
            f"optim: {_PAGED_8BIT}",
            "the optimizer's state in 8 bits",
            lambda state: _with(state, optim=_PAGED_8BIT),
        )
    length = getattr(args, "max_length", None)
    while length is not None and length // 2 >= _LEAST_LENGTH:
        length //= 2
        yield _Candidate(
            "length",
            f"max_length: {length}",
            f"other training: {_share_beyond(lengths, length)} of the longest rows are cut",
            partial(_shorter, length=length),
        )
    shards = target.device == "cuda" and target.strategy in ("single", "ddp")
    for ranks in (2, 4, 8) if shards and options.load_in_4bit and options.use_peft else ():
        if ranks >= target.ranks:
            yield _Candidate(
                "ranks",
                f"accelerate launch --config_file launch/fsdp2.yaml --num_processes {ranks}",
                f"{ranks} GPUs hold one base between them; divide gradient_accumulation_steps to keep the batch",
                partial(_sharded, ranks=ranks),
            )


def _smaller_batches(args: Any, tokens: int | None) -> Iterator[_Candidate]:
    """The same training in smaller pieces: divisors of the batch; where tokens close a batch, fewer of them."""
    rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if tokens is not None:
        yield _Candidate(
            "batch",
            f"max_tokens_per_batch: {tokens // 2}, gradient_accumulation_steps: {2 * accumulation}",
            "about the same training in smaller pieces",
            lambda state: replace(
                _with(state, gradient_accumulation_steps=2 * accumulation), token_budget=tokens // 2
            ),
        )
        return
    for size in _divisors(rows):
        steps = accumulation * rows // size
        yield _Candidate(
            "batch",
            f"per_device_train_batch_size: {size}, gradient_accumulation_steps: {steps}",
            "the same training in smaller pieces",
            partial(_with, per_device_train_batch_size=size, gradient_accumulation_steps=steps),
        )


def _divisors(rows: int) -> list[int]:
    """The numbers below ``rows`` that divide it, the largest first."""
    return [each for each in range(rows - 1, 0, -1) if rows % each == 0]


def _held(trainer: Any, state: _State) -> Memory:
    report, model = trainer.report, trainer.model
    workload = workload_of(
        state.args,
        model,
        state.lengths,
        report.fusion,
        report.workload.sides,
        state.token_budget,
        state.place,
        state.evaluated,
        evaluates=trainer.eval_dataset is not None,
    )
    return memory.predict(model, workload, state.level)


def _with(state: _State, **values: Any) -> _State:
    args = copy.copy(state.args)
    for name, value in values.items():
        setattr(args, name, value)
    return replace(state, args=args)


def _sharded(state: _State, ranks: int) -> _State:
    return replace(state, place=replace(state.place, strategy="fsdp2", world_size=ranks))


def _shorter(state: _State, length: int) -> _State:
    def cut(lengths: Lengths | None) -> Lengths | None:
        if lengths is None:
            return None
        sides = tuple(np.minimum(each, length) for each in lengths.sides)
        return replace(lengths, sides=sides, common=np.minimum(lengths.common, length))

    kept = _with(state, max_length=length)
    return replace(kept, lengths=cut(state.lengths), evaluated=cut(state.evaluated))


def _share_beyond(lengths: Lengths | None, length: int) -> str:
    if lengths is None:
        return "some"
    return f"{(np.maximum.reduce(lengths.sides) > length).mean():.0%}"
