"""A plan in lines: the verdict first, then memory by part, what is trained on, and what would make it fit."""

from collections.abc import Iterator

from halfbyte.plan.figures import Figures
from halfbyte.plan.plan import Plan
from halfbyte.terminal.wording import aligned, count, duration, memory, plural

# The parts of the memory model, as a reader knows them.
_PARTS = {
    "four_bit_weights": "base, 4-bit weights",
    "quantization_state": "base, quantization constants",
    "other_weights": "base, what is not in 4 bits",
    "adapters": "adapters, or all trained weights",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "activations kept for the backward",
    "working": "working memory of a layer or the head",
    "gathered": "weights gathered from other ranks",
    "buckets": "gradient buckets of DDP",
    "slack": "allocator fragmentation and imports",
}

_PEAKS = {"step": "a step", "evaluation": "an evaluation"}


def page(plan: Plan) -> list[str]:
    """Return the lines to print."""
    verdict = [*_verdict(plan), *plan.target.notes]
    return [*verdict, *_memory(plan), "", *_data(plan), "", *plan.lines, *_changes(plan)]


def _verdict(plan: Plan) -> Iterator[str]:
    target = plan.target
    kind = "GPU" if target.device == "cuda" else "process"
    where = f"each of {target.ranks} {_several(kind)}" if target.ranks > 1 else f"one {kind}"
    yield (
        f"{plan.verdict}: {memory(plan.memory.total)} at the peak of {_PEAKS[plan.peak]}, "
        f"of {memory(target.capacity)} on {where} ({target.basis}), strategy {target.strategy}"
    )


def _several(kind: str) -> str:
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def _memory(plan: Plan) -> list[str]:
    rows = [
        (_PARTS[name], memory(size) if size >= 2**20 else f"{size / 2**20:.1f} MiB")
        for name, size in plan.memory.parts().items()
        if size
    ]
    lines = [f"  {line}" for line in aligned([*rows, ("total", memory(plan.memory.total))])]
    if plan.memory.pageable:
        lines.append(f"  of which {memory(plan.memory.pageable)} can be paged out to the host")
    if plan.reference is not None:
        lines.append(f"  reference log-probabilities: {plan.reference}; no second model")
    return lines


def _data(plan: Plan) -> Iterator[str]:
    found = plan.figures
    share = plan.trained / plan.parameters
    yield f"trained: {count(plan.trained)} of {count(plan.parameters)} parameters ({share:.2%}), {plan.modules}"
    if found.rows is None:
        yield f"data: a stream; rows, tokens and epochs are not known before it is read; batch of {found.batch} rows"
    else:
        told = f"data: {plural(found.rows, 'row')}"
        if found.read is not None and found.read < found.rows:
            told += f" (estimated from {found.read:,}; the longest were looked at too; --full reads all)"
        if found.sequences is not None:
            told += f" in {plural(found.sequences, 'packed sequence')}"
        if found.tokens is not None:
            told += f", {count(found.tokens)} tokens an epoch"
        if found.longest is not None:
            told += f", the longest {found.longest:,}"
        if found.dropped:
            told += f"; {found.dropped:.1%} of the rows are dropped"
        if found.truncated:
            told += f"; {found.truncated:.1%} of the rows are truncated"
        if found.left_out:
            told += f"; {found.left_out:,} more do not fill the last batch (dataloader_drop_last)"
        if found.padding:
            told += f"; {found.padding:.0%} of a batch is padding"
        yield told
    if found.steps is not None:
        epochs = "" if found.epochs is None else f", {found.epochs:.3g} epochs of {found.steps_per_epoch:,}"
        most = "at most " if found.steps_per_epoch and found.rows and _fewer(found) else ""
        yield f"steps: {found.steps:,} of {most}{found.batch} {'sequences' if found.sequences else 'rows'}{epochs}"
    if plan.seconds_per_epoch is not None and plan.tokens_per_second is not None:
        rate = f"{count(plan.tokens_per_second)} tokens/s a device"
        total = (
            ""
            if found.epochs is None
            else f", {duration(plan.seconds_per_epoch * found.epochs)} of training steps"
        )
        yield f"time: {duration(plan.seconds_per_epoch)} an epoch{total}, at {rate}"
    else:
        yield "time: not known; --probe measures a few steps here, --tokens_per_second N states it"


def _fewer(found: Figures) -> bool:
    """Whether a step has fewer rows than its batch: it closes at a number of tokens."""
    rows = found.rows if found.sequences is None else found.sequences
    return bool(rows and found.steps_per_epoch and rows < (found.steps_per_epoch - 1) * found.batch)


def _changes(plan: Plan) -> Iterator[str]:
    if not plan.changes:
        return
    yield ""
    yield "to make it smaller, the cheapest first:"
    for change in plan.changes:
        yield f"  {memory(change.total)} ({change.verdict}): {change.write}; {change.cost}"
