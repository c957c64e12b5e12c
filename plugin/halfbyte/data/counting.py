"""How a trainer leaves its rows, and what those rows train: tokens, truncated rows, the tokens under the loss."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

IGNORED = -100  # the label of a token that is not trained


@dataclass(frozen=True)
class Counts:
    """One epoch of a split: tokens after truncation, rows that truncation shortens, and rows that it leaves unlabelled.

    ``trained`` is whether any token is left to train on.
    """

    tokens: int
    truncated: int = 0
    unlabelled: int = 0
    trained: bool = True


@dataclass(frozen=True)
class Prepared:
    """Rows as a trainer's ``_prepare_dataset`` leaves them, recognised by their ``columns``.

    ``count(dataset, args)`` counts them under the trainer's arguments. ``trained(dataset, args)`` yields the token ids
    that the loss is computed on, in arrays [T] of one row or several; None where the model is not trained to generate.
    ``whole``: rows are counted before the trainer truncates or packs them, where its preparation does that.
    ``drops_long``: rows longer than ``max_length`` are dropped, and not truncated.
    """

    columns: tuple[str, ...]
    count: Callable[[Any, Any], Counts]
    trained: Callable[[Any, Any], Iterator[np.ndarray]] | None = None
    whole: bool = False
    drops_long: bool = False


def recognise(columns: Collection[str], among: Iterable[Prepared]) -> Prepared | None:
    """The first of ``among`` whose columns are all there, or None."""
    return next((prepared for prepared in among if set(prepared.columns) <= set(columns)), None)


def _columns(dataset: Any, *names: str) -> Iterator[dict[str, pa.Array]]:
    """Batches of list columns as arrow arrays."""
    for table in dataset.select_columns(list(names)).with_format("arrow").iter(batch_size=1000):
        yield {name: table[name].combine_chunks() for name in names}


def _lengths(column: pa.Array) -> np.ndarray:
    return column.value_lengths().to_numpy(zero_copy_only=False)


def _values(column: pa.Array) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False)


def _count_sequences(dataset: Any, args: Any) -> Counts:
    """Count labelled sequences that are still whole, as SFTTrainer truncates, drops or packs them afterwards."""
    packing, limit = getattr(args, "packing", False), args.max_length
    if packing and args.packing_strategy != "bfd":
        limit = None  # these strategies cut sequences and keep the pieces
    keep_end = not packing and args.truncation_mode == "keep_end"
    tokens = truncated = unlabelled = labelled_rows = 0
    for batch in _columns(dataset, "input_ids", "labels"):
        lengths = _lengths(batch["input_ids"])
        labels = _values(batch["labels"]) != IGNORED
        kept = lengths if limit is None else np.minimum(lengths, limit)
        row = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        inside = place >= (lengths - kept)[row] if keep_end else place < kept[row]
        labelled = np.bincount(row[labels & inside], minlength=len(lengths)) > 0
        # TRL drops fully masked rows where it truncates, and keeps them otherwise.
        trained = labelled if limit is not None and not packing else np.ones_like(labelled)
        tokens += int(kept[trained].sum())
        truncated += int((trained & (kept < lengths)).sum())
        unlabelled += int((~trained).sum())
        labelled_rows += int(labelled.sum())
    return Counts(tokens, truncated, unlabelled, trained=labelled_rows > 0)


def _trained_labels(dataset: Any, args: Any) -> Iterator[np.ndarray]:
    """The labels under the loss, by batches of rows: not ignored, not at the start of a sequence."""
    packed = "seq_lengths" in dataset.column_names
    for batch in _columns(dataset, "labels", *(["seq_lengths"] if packed else [])):
        labels = _values(batch["labels"])
        lengths = _values(batch["seq_lengths"]) if packed else _lengths(batch["labels"])
        trained = labels != IGNORED
        # Nothing predicts a first token; it would pass for an end token where bos and eos are one.
        trained[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
        yield labels[trained]


def _counter(*sides: tuple[str, ...]) -> Callable[[Any, Any], Counts]:
    """Count rows of one or more sequences, each the columns of one of ``sides`` joined; the collator truncates."""
    names = tuple(dict.fromkeys(name for side in sides for name in side))

    def count(dataset: Any, args: Any) -> Counts:
        limit = args.max_length
        tokens = truncated = 0
        for batch in _columns(dataset, *names):
            lengths = {name: _lengths(batch[name]) for name in names}
            whole = np.stack([sum(lengths[name] for name in side) for side in sides])  # [side, row]
            kept = whole if limit is None else np.minimum(whole, limit)
            tokens += int(kept.sum())
            truncated += int((kept < whole).any(axis=0).sum())
        return Counts(tokens, truncated)

    return count


def _completions(column: str) -> Callable[[Any, Any], Iterator[np.ndarray]]:
    """The tokens of ``column`` behind ``prompt_ids`` that truncation leaves, row by row."""

    def trained(dataset: Any, args: Any) -> Iterator[np.ndarray]:
        limit, keep_start = args.max_length, getattr(args, "truncation_mode", "keep_start") == "keep_start"
        for batch in _columns(dataset, "prompt_ids", column):
            rows = zip(batch["prompt_ids"].to_pylist(), batch[column].to_pylist(), strict=True)
            for prompt, completion in rows:
                start = 0 if prompt else 1  # nothing predicts the first token of a sequence
                ids = np.asarray(completion[start:], dtype=np.int64)
                if limit is not None and keep_start:
                    ids = ids[: max(0, limit - len(prompt) - start)]
                elif limit is not None:
                    ids = ids[max(0, len(ids) - limit) :]
                yield ids

    return trained


SEQUENCES = Prepared(("input_ids", "labels"), _count_sequences, _trained_labels, whole=True)
"""Labelled sequences: ``SFTTrainer``."""

PAIRS = Prepared(
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    _counter(("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids")),
    _completions("chosen_ids"),
)
"""A prompt with a chosen and a rejected completion: ``DPOTrainer``."""

SCORED_PAIRS = Prepared(
    ("chosen_ids", "rejected_ids"), _counter(("chosen_ids",), ("rejected_ids",)), drops_long=True
)
"""Two whole sequences that are scored, and not generated: ``RewardTrainer``."""

COMPLETIONS = Prepared(
    ("prompt_ids", "completion_ids"),
    _counter(("prompt_ids", "completion_ids")),
    _completions("completion_ids"),
)
"""A prompt with one completion: ``KTOTrainer``."""

KNOWN = (SEQUENCES, PAIRS, SCORED_PAIRS, COMPLETIONS)
"""Rows of a recipe without a format are counted where they are one of these."""
