"""What the trainer's own preparation leaves of the rows: counted, and never all of them masked."""

import copy
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from trl import DPOTrainer, SFTTrainer

from halfbyte.data.report import DataReport, SplitReport
from halfbyte.data.rows import first_refused
from halfbyte.data.template import stop_ids
from halfbyte.errors import UserError

IGNORED = -100  # the label of a token that is not trained
STREAMED = 1000  # rows of a stream that are searched for an end token


def counted(trainer_cls: type, report: DataReport) -> type:
    """A subclass of a TRL trainer that trains on the same rows and counts what preparing them costs.

    A trainer without ``_prepare_dataset`` is returned as it is. Constructing the subclass raises UserError
    for a row that the chat template cannot render, and where no row has a label left.
    """
    prepare = getattr(trainer_cls, "_prepare_dataset", None)
    if prepare is None:
        return trainer_cls

    def _prepare_dataset(self: Any, dataset: Any, processing_class: Any, args: Any, *rest: Any) -> Any:
        counts = report.split(rest[-1])
        # The Trainer prepares again what is passed to `evaluate`; the first time is the run's.
        if counts is None or counts.counted or isinstance(dataset, datasets.IterableDataset):
            return prepare(self, dataset, processing_class, args, *rest)
        counts.counted = True
        counts.max_length = getattr(args, "max_length", None)
        try:
            if prepare is SFTTrainer._prepare_dataset:
                packing, formatting, name = rest
                whole = _whole(prepare, self, dataset, processing_class, args, formatting, name)
                _count_tokens(whole, args, packing, counts, name)
                # Tokenized and labelled already: what is left to TRL is to truncate, drop, pack and shuffle.
                ready = prepare(self, whole, processing_class, args, packing, None, name)
                counts.packed = len(ready) if packing else None
            else:
                ready = prepare(self, dataset, processing_class, args, *rest)
                counts.lost_rows = max(0, len(dataset) - len(ready))
                if issubclass(trainer_cls, DPOTrainer):
                    _count_pairs(ready, args, counts)
        except UserError:
            raise
        except Exception as error:
            _blame_row(dataset, rest[-1], counts, error)
            raise
        if len(ready) == 0:
            raise _nothing_left(rest[-1], counts)
        return ready

    return type(trainer_cls.__name__, (trainer_cls,), {"_prepare_dataset": _prepare_dataset})


def _whole(
    prepare: Any, trainer: Any, dataset: Any, processing_class: Any, args: Any, formatting: Any, name: str
) -> Any:
    """The rows as SFTTrainer tokenizes and labels them, before it truncates, packs or shuffles."""
    untouched = copy.copy(args)  # not dataclasses.replace: __post_init__ has effects of its own
    untouched.max_length, untouched.shuffle_dataset = None, False
    return prepare(trainer, dataset, processing_class, untouched, False, formatting, name)


def _columns(dataset: Any, *names: str) -> Iterator[dict[str, pa.Array]]:
    """Batches of list columns as arrow arrays."""
    for table in dataset.select_columns(list(names)).with_format("arrow").iter(batch_size=1000):
        yield {name: table[name].combine_chunks() for name in names}


def _lengths(column: pa.Array) -> np.ndarray:
    return column.value_lengths().to_numpy(zero_copy_only=False)


def _count_tokens(dataset: Any, args: Any, packing: bool, counts: SplitReport, name: str) -> None:
    """Fill in tokens, truncated and lost rows of language-modeling rows that are whole yet."""
    limit = args.max_length
    if packing and args.packing_strategy != "bfd":
        limit = None  # these strategies cut sequences and keep the pieces
    keep_end = not packing and args.truncation_mode == "keep_end"
    tokens = truncated = lost = labelled_rows = 0
    for batch in _columns(dataset, "input_ids", "labels"):
        lengths = _lengths(batch["input_ids"])
        labels = batch["labels"].flatten().to_numpy(zero_copy_only=False) != IGNORED
        kept = lengths if limit is None else np.minimum(lengths, limit)
        row = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        inside = place >= (lengths - kept)[row] if keep_end else place < kept[row]
        labelled = np.bincount(row[labels & inside], minlength=len(lengths)) > 0
        # TRL drops fully masked rows where it truncates, and keeps them otherwise.
        trained = labelled if limit is not None and not packing else np.ones_like(labelled)
        tokens += int(kept[trained].sum())
        truncated += int((trained & (kept < lengths)).sum())
        lost += int((~trained).sum())
        labelled_rows += int(labelled.sum())
    counts.tokens, counts.truncated, counts.lost_rows = tokens, truncated, lost
    if labelled_rows == 0:
        raise _nothing_left(name, counts)


def _count_pairs(dataset: Any, args: Any, counts: SplitReport) -> None:
    """Fill in tokens and truncated rows of preference pairs, which the collator truncates later."""
    limit = args.max_length
    tokens = truncated = 0
    for batch in _columns(dataset, "prompt_ids", "chosen_ids", "rejected_ids"):
        prompt = _lengths(batch["prompt_ids"])
        sides = [prompt + _lengths(batch[side]) for side in ("chosen_ids", "rejected_ids")]
        kept = sides if limit is None else [np.minimum(side, limit) for side in sides]
        tokens += int(sum(side.sum() for side in kept))
        truncated += int(((kept[0] < sides[0]) | (kept[1] < sides[1])).sum())
    counts.tokens, counts.truncated = tokens, truncated


def _nothing_left(name: str, counts: SplitReport) -> UserError:
    cut = "" if counts.max_length is None else f" after truncation to max_length {counts.max_length}"
    return UserError(
        f"{name}: no row has a token to train on{cut}\n"
        "  raise `max_length`, shorten the prompts, or check which tokens the loss options mask"
    )


def _blame_row(dataset: Any, name: str, counts: SplitReport, error: Exception) -> None:
    """Raise UserError naming the row that the chat template refused, where that is what went wrong."""
    if counts.check is None or not counts.check.conversational:
        return
    if refused := first_refused(dataset, counts.check):
        number, told = refused
        for gone in counts.equal_rows:  # ascending: back to the row's number before they were dropped
            number += gone <= number
        raise UserError(f"{name} row {number}: the chat template cannot render it: {told}") from error


def check_labels(trainer: Any, report: DataReport) -> None:
    """Refuse a trainer none of whose training rows has a label, or teaches the model to stop.

    Looks at language-modeling rows (``labels``) and preference pairs (``chosen_ids``), and returns at the
    first row that trains the turn-end or end-of-sequence token. Of a stream only the first 1000 rows are
    read. Raises UserError.
    """
    dataset = trainer.train_dataset
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if isinstance(dataset, datasets.IterableDataset):
        dataset = datasets.Dataset.from_list(list(dataset.take(STREAMED)))
    processing = trainer.processing_class
    tokenizer = getattr(processing, "tokenizer", processing)
    stops = stop_ids(tokenizer, getattr(trainer, "chat_template", None))
    generation = getattr(trainer.model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    stops |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    if "labels" in columns:
        trained = _trained_labels(dataset)
    elif "chosen_ids" in columns:
        trained = _trained_chosen(dataset, trainer.args)
    else:
        return
    any_label = False
    for ids in trained:
        any_label = any_label or ids.size > 0
        if np.isin(ids, list(stops)).any():
            return
    if not any_label:
        raise _nothing_left("train", report.train)
    names = ", ".join(sorted(str(tokenizer.convert_ids_to_tokens(stop)) for stop in stops)) or "none is known"
    raise UserError(
        f"train: no row trains an end token ({names}), so the model would never learn to stop\n"
        f"  either `max_length` ({getattr(trainer.args, 'max_length', None)}) cuts it off every row,\n"
        "  or the chat template writes none after the assistant's words,\n"
        "  or, with assistant_only_loss, it stands outside {% generation %}...{% endgeneration %}"
    )


def _trained_labels(dataset: Any) -> Iterator[np.ndarray]:
    """The labels of each batch of rows that the loss sees: not ignored, not at the start of a sequence."""
    packed = "seq_lengths" in dataset.column_names
    names = ["labels", "seq_lengths"] if packed else ["labels"]
    for batch in _columns(dataset, *names):
        labels = batch["labels"].flatten().to_numpy(zero_copy_only=False)
        lengths = batch["seq_lengths"].flatten() if packed else batch["labels"].value_lengths()
        lengths = lengths.to_numpy(zero_copy_only=False)
        trained = labels != IGNORED
        # Nothing predicts a first token; it would pass for an end token where bos and eos are one.
        trained[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
        yield labels[trained]


def _trained_chosen(dataset: Any, args: Any) -> Iterator[np.ndarray]:
    """The tokens of each chosen side that truncation leaves."""
    limit = args.max_length
    for batch in _columns(dataset, "prompt_ids", "chosen_ids"):
        for prompt, chosen in zip(
            batch["prompt_ids"].to_pylist(), batch["chosen_ids"].to_pylist(), strict=True
        ):
            start = 0 if prompt else 1
            ids = np.asarray(chosen[start:], dtype=np.int64)
            if limit is not None and args.truncation_mode == "keep_start":
                ids = ids[: max(0, limit - len(prompt) - start)]
            elif limit is not None:
                ids = ids[max(0, len(ids) - limit) :]
            yield ids
