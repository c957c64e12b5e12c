"""What a planned run trains on: rows, tokens and steps of all the data, told from the rows that were read."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from halfbyte.data import RunData
from halfbyte.data.batching import micro_batches
from halfbyte.data.lengths import Lengths

_DRAWS = 16


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One epoch of a run, and how many of them; None where the rows do not say.

    ``rows`` are those that train, in ``sequences`` where they are packed; ``read`` of them were looked at. ``tokens``
    are those of one epoch as a run counts them, of a pair both sides with their prompt, and ``padding`` is the share of
    a batch that is none of them; ``truncated`` and ``dropped`` are the shares of rows that lose tokens to
    ``max_length``, and that do not train. ``left_out`` rows, or sequences, do not fill the last batch of an epoch where
    ``dataloader_drop_last`` is set.
    """

    rows: int | None = None
    sequences: int | None = None
    read: int | None = None
    tokens: int | None = None
    longest: int | None = None
    padding: float | None = None
    truncated: float | None = None
    dropped: float | None = None
    left_out: int = 0
    batch: int
    steps_per_epoch: int | None = None
    steps: int | None = None
    epochs: float | None = None

    def with_longest(self, trainer: Any) -> "Figures":
        """Return these figures with the longest row of ``trainer``, which is built over the longest."""
        lengths = trainer.report.lengths
        return self if lengths is None else replace(self, longest=_longest(lengths))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in JSON's types."""
        return asdict(self)


def figures(trainer: Any, rows: RunData) -> Figures:
    """Return the figures of the run that ``trainer``, built over ``rows``, stands for."""
    args, report, ranks = trainer.args, rows.report.train, trainer.report.workload.world_size
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    lengths = trainer.report.lengths
    given = args.max_steps if args.max_steps > 0 else None
    if report.whole is None:  # a stream
        return Figures(batch=size, steps=given)
    read, whole = report.rows or 0, report.whole
    prepared = len(trainer.train_dataset)
    there = kept = round(prepared * whole / max(read, 1))
    batches = _batches(trainer, kept, prepared, ranks)
    if args.dataloader_drop_last:  # other rows in each epoch, as many of them
        kept = batches * args.per_device_train_batch_size * ranks
    used = whole / max(read, 1) * kept / max(there, 1)
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    steps = given or math.ceil(args.num_train_epochs * per_epoch)
    tokens = longest = padding = None
    if lengths is not None:
        fusion = trainer.report.fusion
        sizes = lengths.sizes(padded=False)
        tokens, longest = round(float(sizes.mean()) * kept), _longest(lengths)
        free = fusion.padding_free or fusion.trees
        padding = 0.0 if free else _padding(lengths, args.per_device_train_batch_size)
    elif report.tokens is not None:
        tokens = round(report.tokens * used)
    packed = report.packed is not None
    return Figures(
        rows=round((read - (report.dropped or 0)) * used) if packed else kept,
        sequences=kept if packed else None,
        read=read,
        tokens=tokens,
        longest=longest,
        padding=padding,
        truncated=None if report.truncated is None else report.truncated / max(read, 1),
        dropped=(report.dropped or 0) / max(read, 1),
        left_out=there - kept,
        batch=size,
        steps_per_epoch=per_epoch,
        steps=steps,
        epochs=steps / per_epoch,
    )


def _batches(trainer: Any, kept: int, prepared: int, ranks: int) -> int:
    """The micro-batches of one epoch on one rank."""
    args = trainer.args
    if trainer.batching is not None:
        return math.ceil(len(trainer.batching) * kept / max(prepared, 1) / ranks)
    return micro_batches(kept, args.per_device_train_batch_size, ranks, drop_last=args.dataloader_drop_last)


def _longest(lengths: Lengths) -> int:
    return int(np.maximum.reduce(lengths.sides).max())


def _padding(lengths: Lengths, size: int) -> float:
    """The share of padding in batches of ``size`` rows that are drawn at random."""
    sizes: Sequence[np.ndarray] = [lengths.sizes(padded=flag) for flag in (False, True)]
    own, padded = sizes
    draw = np.random.default_rng(0)
    real = total = 0
    for _ in range(_DRAWS):
        order = draw.permutation(len(own))
        for start in range(0, len(own), size):
            rows = order[start : start + size]
            real += int(own[rows].sum())
            total += int(len(rows) * padded[rows].max())
    return 1 - real / max(total, 1)
