"""How a trainer leaves its rows, and what those rows train: tokens, truncated rows, the tokens under the loss."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from halfbyte.terminal.passes import Pass

IGNORED = -100  # the label of a token that is not trained


@dataclass(frozen=True)
class Counts:
    """One epoch of a split: tokens after truncation, and how many rows truncation shortens.

    ``unlabelled`` are the places of rows without a label left, from 0: they are dropped, and not among the tokens.
    """

    tokens: int
    truncated: int = 0
    unlabelled: Sequence[int] = ()


@dataclass(frozen=True)
class Prepared:
    """Rows as a trainer's ``_prepare_dataset`` leaves them, recognised by their ``columns``.

    ``count(dataset, args)`` counts them under the trainer's arguments. ``trained(dataset, args)`` yields the token ids
    that the loss is computed on, in arrays [T] of one row or several; None where the model is not trained to generate.
    ``whole``: rows are counted before the trainer truncates or packs them, where its preparation does that.
    ``drops_long``: rows longer than ``max_length`` are dropped, and not truncated.
    ``labelled(row, args)`` is whether a row has a label left; ``differ(row, args)`` whether its two sides train
    different tokens. ``equal(dataset, args)`` returns the places, from 0, of rows whose sides do not differ.
    """

    columns: tuple[str, ...]
    count: Callable[[Any, Any], Counts]
    trained: Callable[[Any, Any], Iterator[np.ndarray]] | None = None
    whole: bool = False
    drops_long: bool = False
    labelled: Callable[[Mapping[str, Any], Any], bool] | None = None
    differ: Callable[[Mapping[str, Any], Any], bool] | None = None
    equal: Callable[[Any, Any], list[int]] | None = None


def recognise(columns: Collection[str], among: Iterable[Prepared]) -> Prepared | None:
    """The first of ``among`` whose columns are all there, or None."""
    return next((prepared for prepared in among if set(prepared.columns) <= set(columns)), None)


def list_batches(dataset: Any, *names: str) -> Iterator[dict[str, pa.Array]]:
    """Batches of list columns as arrow arrays."""
    with Pass("counting tokens", len(dataset)) as progress:
        for table in dataset.select_columns(list(names)).with_format("arrow").iter(batch_size=1000):
            yield {name: table[name].combine_chunks() for name in names}
            progress.advance(len(table))


def list_lengths(column: pa.Array) -> np.ndarray:
    """The length of each list of ``column``, ``[rows]``."""
    return column.value_lengths().to_numpy(zero_copy_only=False)


def list_values(column: pa.Array) -> np.ndarray:
    """The values of all lists of ``column``, one after the other."""
    return column.flatten().to_numpy(zero_copy_only=False)


def rows_above_zero(dataset: Any, column: str) -> int:
    """How many rows hold more than zero in a column of numbers."""
    tables = dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000)
    return sum(int((table[column].to_numpy() > 0).sum()) for table in tables)


def _limits(args: Any) -> tuple[int | None, bool]:
    """The length that SFTTrainer truncates a sequence to, and whether it keeps the end of it."""
    packing, limit = getattr(args, "packing", False), args.max_length
    if packing and args.packing_strategy != "bfd":
        limit = None  # these strategies cut sequences and keep the pieces
    return limit, not packing and args.truncation_mode == "keep_end"


def _count_sequences(dataset: Any, args: Any) -> Counts:
    """Count labelled sequences that are still whole, as SFTTrainer truncates or packs them afterwards."""
    limit, keep_end = _limits(args)
    tokens = truncated = rows = 0
    unlabelled: list[int] = []
    for batch in list_batches(dataset, "input_ids", "labels"):
        lengths = list_lengths(batch["input_ids"])
        labels = list_values(batch["labels"]) != IGNORED
        kept = lengths if limit is None else np.minimum(lengths, limit)
        row = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        inside = place >= (lengths - kept)[row] if keep_end else place < kept[row]
        trained = np.bincount(row[labels & inside], minlength=len(lengths)) > 0
        tokens += int(kept[trained].sum())
        truncated += int((trained & (kept < lengths)).sum())
        unlabelled += (np.flatnonzero(~trained) + rows).tolist()
        rows += len(lengths)
    return Counts(tokens, truncated, unlabelled)


def _labelled(row: Mapping[str, Any], args: Any) -> bool:
    limit, keep_end = _limits(args)
    labels = row["labels"]
    if limit is not None:
        labels = labels[-limit:] if keep_end else labels[:limit]
    return any(label != IGNORED for label in labels)


def unlabelled_packs(dataset: Any) -> list[int]:
    """The places, from 0, of packed sequences that hold pieces of rows without any label."""
    found: list[int] = []
    rows = 0
    for batch in list_batches(dataset, "labels"):
        lengths = list_lengths(batch["labels"])
        row = np.repeat(np.arange(len(lengths)), lengths)
        trained = np.bincount(row[list_values(batch["labels"]) != IGNORED], minlength=len(lengths)) > 0
        found += (np.flatnonzero(~trained) + rows).tolist()
        rows += len(lengths)
    return found


def _trained_labels(dataset: Any, args: Any) -> Iterator[np.ndarray]:
    """The labels under the loss, by batches of rows: not ignored, not at the start of a sequence."""
    packed = "seq_lengths" in dataset.column_names
    for batch in list_batches(dataset, "labels", *(["seq_lengths"] if packed else [])):
        labels = list_values(batch["labels"])
        lengths = list_values(batch["seq_lengths"]) if packed else list_lengths(batch["labels"])
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
        for batch in list_batches(dataset, *names):
            lengths = {name: list_lengths(batch[name]) for name in names}
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
        for batch in list_batches(dataset, "prompt_ids", column):
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


def _differ(*sides: tuple[str, ...]) -> Callable[[Mapping[str, Any], Any], bool]:
    """Whether two sequences, each the columns of one of ``sides`` joined, differ in ids or loss after truncation.

    The loss is on the last column of each.
    """

    def trained(row: Mapping[str, Any], side: tuple[str, ...], args: Any) -> tuple[list[int], int]:
        ids = [token for name in side for token in row[name]]
        prompt = len(ids) - len(row[side[-1]])
        if (limit := args.max_length) is None:
            return ids, prompt
        if getattr(args, "truncation_mode", "keep_start") == "keep_start":
            return ids[:limit], prompt
        return ids[-limit:], max(0, prompt - max(0, len(ids) - limit))

    def differ(row: Mapping[str, Any], args: Any) -> bool:
        one, other = (trained(row, side, args) for side in sides)
        return one != other

    return differ


def _equal(*sides: tuple[str, ...]) -> Callable[[Any, Any], list[int]]:
    """The places of rows whose sides do not differ; only rows whose lengths allow it are looked at one by one."""
    names, differ = tuple(dict.fromkeys(name for side in sides for name in side)), _differ(*sides)

    def equal(dataset: Any, args: Any) -> list[int]:
        limit, found, rows = args.max_length, [], 0
        for batch in list_batches(dataset, *names):
            one, other = (sum(list_lengths(batch[name]) for name in side) for side in sides)
            if limit is not None:
                one, other = np.minimum(one, limit), np.minimum(other, limit)
            places = np.flatnonzero(one == other)
            columns = [batch[name].take(pa.array(places)).to_pylist() for name in names]
            for place, *values in zip(places.tolist(), *columns, strict=True):
                if not differ(dict(zip(names, values, strict=True)), args):
                    found.append(rows + place)
            rows += len(batch[names[0]])
        return found

    return equal


_SIDES = (("prompt_ids", "chosen_ids"), ("rejected_prompt_ids", "rejected_ids"))
_PAIR = (("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids"))
_SCORED = (("chosen_ids",), ("rejected_ids",))

SEQUENCES = Prepared(
    ("input_ids", "labels"), _count_sequences, _trained_labels, whole=True, labelled=_labelled
)
"""Labelled sequences: ``SFTTrainer``."""

PAIRS = Prepared(
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    _counter(*_PAIR),
    _completions("chosen_ids"),
    differ=_differ(*_PAIR),
    equal=_equal(*_PAIR),
)
"""A prompt with a chosen and a rejected completion: ``DPOTrainer``."""

SCORED_PAIRS = Prepared(
    ("chosen_ids", "rejected_ids"),
    _counter(*_SCORED),
    drops_long=True,
    differ=_differ(*_SCORED),
    equal=_equal(*_SCORED),
)
"""Two whole sequences that are scored, and not generated: ``RewardTrainer``."""

SIDES = Prepared(
    ("prompt_ids", "chosen_ids", "rejected_prompt_ids", "rejected_ids"),
    _counter(*_SIDES),
    differ=_differ(*_SIDES),
    equal=_equal(*_SIDES),
)
"""A pair on its way to two completions, each behind as much of the prompt as it begins with."""

COMPLETIONS = Prepared(
    ("prompt_ids", "completion_ids"),
    _counter(("prompt_ids", "completion_ids")),
    _completions("completion_ids"),
)
"""A prompt with one completion: ``KTOTrainer``."""

KNOWN = (SEQUENCES, PAIRS, SCORED_PAIRS, COMPLETIONS)
"""Rows of a recipe without a format are counted where they are one of these."""
