"""What the trainer's own preparation leaves of the rows: counted, and never all of them masked."""

import copy
import inspect
from typing import Any

import datasets
import numpy as np

from halfbyte.data.counting import KNOWN, Prepared, recognise
from halfbyte.data.report import DataReport, SplitReport
from halfbyte.data.rows import first_refused
from halfbyte.data.template import stop_ids
from halfbyte.errors import UserError

STREAMED = 1000  # rows of a stream that are searched for an end token


class CountedRows:
    """Over a TRL trainer: trains on the same rows, and counts in ``rows_report`` what preparing them costs.

    Constructing the trainer raises UserError for a row that the chat template cannot render, and where no row has a
    token left to train on.
    """

    rows_report: DataReport

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any) -> Any:
        """Prepare a split as the trainer below does; the last argument is TRL's name of the split."""
        prepare, name = super()._prepare_dataset, str(rest[-1])  # type: ignore[misc]
        counts = self.rows_report.split(name)
        # The Trainer prepares again what is passed to `evaluate`; the first time is the run's.
        if counts is None or counts.counted or isinstance(dataset, datasets.IterableDataset):
            return prepare(dataset, processing_class, args, *rest)
        counts.counted = True
        counts.max_length = getattr(args, "max_length", None)
        given = inspect.signature(prepare).bind(dataset, processing_class, args, *rest)
        try:
            if "packing" in given.arguments:
                ready = self._packed(prepare, given, counts, name)
            else:
                ready = prepare(*given.args)
                found = self._recognised(ready, whole=False)
                lost = max(0, len(dataset) - len(ready))
                if found is not None:
                    _note(counts, found, ready, args)
                if found is not None and found.drops_long:
                    counts.long_rows = lost
                else:
                    counts.lost_rows = lost
        except UserError:
            raise
        except Exception as error:
            _blame_row(dataset, name, counts, error)
            raise
        if len(ready) == 0:
            raise _nothing_left(name, counts)
        return ready

    def _packed(self, prepare: Any, given: inspect.BoundArguments, counts: SplitReport, name: str) -> Any:
        """Prepare in two calls: tokenized and labelled, counted; then truncated, packed and shuffled."""
        args, packing = given.arguments["args"], given.arguments["packing"]
        untouched = copy.copy(args)  # not dataclasses.replace: __post_init__ has effects of its own
        untouched.max_length, untouched.shuffle_dataset = None, False
        given.arguments.update(args=untouched, packing=False)
        whole = prepare(*given.args)
        if (found := self._recognised(whole, whole=True)) is not None:
            # An evaluation may be packed where training is not.
            counting = copy.copy(args)
            counting.packing = packing
            _note(counts, found, whole, counting)
            if not counts.trainable:
                raise _nothing_left(name, counts)
        given.arguments.update(dataset=whole, args=args, packing=packing, formatting_func=None)
        ready = prepare(*given.args)
        counts.packed = len(ready) if packing else None
        return ready

    def _recognised(self, dataset: Any, *, whole: bool) -> Prepared | None:
        format = self.rows_report.format
        found = recognise(dataset.column_names, KNOWN if format is None else format.prepared)
        return found if found is not None and found.whole == whole else None


def counted(trainer_cls: type, report: DataReport) -> type:
    """A subclass of a TRL trainer with :class:`CountedRows` over it; a class that prepares nothing is returned."""
    if not hasattr(trainer_cls, "_prepare_dataset"):
        return trainer_cls
    body = {"rows_report": report, "__doc__": trainer_cls.__doc__, "__module__": trainer_cls.__module__}
    return type(trainer_cls.__name__, (CountedRows, trainer_cls), body)


def _note(counts: SplitReport, found: Prepared, dataset: Any, args: Any) -> None:
    counted_rows = found.count(dataset, args)
    counts.tokens, counts.truncated = counted_rows.tokens, counted_rows.truncated
    counts.lost_rows, counts.trainable = counted_rows.unlabelled, counted_rows.trained


def _nothing_left(name: str, counts: SplitReport) -> UserError:
    if counts.long_rows:
        return UserError(f"every row is longer than `max_length` {counts.max_length}; raise it", split=name)
    cut = "" if counts.max_length is None else f" after truncation to max_length {counts.max_length}"
    return UserError(
        f"no row has a token to train on{cut}\n"
        "  raise `max_length`, shorten the prompts, or check which tokens the loss options mask",
        split=name,
    )


def _blame_row(dataset: Any, name: str, counts: SplitReport, error: Exception) -> None:
    """Raise UserError naming the row that the chat template refused, if that is what failed."""
    if counts.check is None or not counts.check.conversational:
        return
    if refused := first_refused(dataset, counts.check):
        number, reason = refused
        for dropped in counts.equal_rows:  # ascending: back to the row's number before they were dropped
            number += dropped <= number
        raise UserError(f"the chat template cannot render it: {reason}", split=name, row=number) from error


def check_labels(trainer: Any, report: DataReport) -> None:
    """Refuse a trainer none of whose training rows has a label, or teaches the model to stop.

    Looks at the tokens that the format of ``report`` says are trained, and returns at the first row that trains the
    turn-end or end-of-sequence token. Of a stream only the first 1000 rows are read. Raises UserError.
    """
    dataset = trainer.train_dataset
    if isinstance(dataset, datasets.IterableDataset):
        dataset = datasets.Dataset.from_list(list(dataset.take(STREAMED)))
    trained = None if report.format is None else report.format.trained(dataset, trainer.args)
    if trained is None:
        return
    processing = trainer.processing_class
    tokenizer = getattr(processing, "tokenizer", processing)
    stops = stop_ids(tokenizer, getattr(trainer, "chat_template", None))
    generation = getattr(trainer.model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    stops |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    any_label = False
    for ids in trained:
        any_label = any_label or ids.size > 0
        if np.isin(ids, list(stops)).any():
            return
    if not any_label:
        raise _nothing_left("train", report.train)
    names = ", ".join(sorted(str(tokenizer.convert_ids_to_tokens(stop)) for stop in stops)) or "none is known"
    raise UserError(
        f"no row trains an end token ({names}), so the model would never learn to stop\n"
        f"  either `max_length` ({getattr(trainer.args, 'max_length', None)}) truncates it in every row,\n"
        "  or the chat template writes none after the assistant's message,\n"
        "  or, with assistant_only_loss, it is outside of {% generation %}...{% endgeneration %}",
        split="train",
    )
