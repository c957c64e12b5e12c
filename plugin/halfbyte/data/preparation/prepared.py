"""What the trainer's own preparation leaves of the rows: counted, and never all of them masked."""

import copy
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from trl.data_utils import extract_prompt

from halfbyte.data.chat.template import stop_ids
from halfbyte.data.preparation import equal, unpairing
from halfbyte.data.preparation.counting import (
    IGNORED,
    KNOWN,
    Prepared,
    recognise,
    rows_above_zero,
    unlabelled_packs,
)
from halfbyte.data.preparation.encoding import UnrenderedRow
from halfbyte.data.preparation.mapping import mapped, workers
from halfbyte.data.preparation.sides import prepared_as_dpo
from halfbyte.data.preparation.tables import LEFT_OUT
from halfbyte.data.preparation.tokenizing import Pairs, Truncated, tokenizing
from halfbyte.data.preparation.unpairing import Answers
from halfbyte.data.progress import showing
from halfbyte.data.report import DataReport, SplitReport
from halfbyte.data.rows import first_refused
from halfbyte.errors import UserError
from halfbyte.terminal.wording import plural

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
        if counts is None or counts.counted:
            return prepare(dataset, processing_class, args, *rest)
        counts.counted = True
        counts.max_length = getattr(args, "max_length", None)
        given = inspect.signature(prepare).bind(dataset, processing_class, args, *rest)
        streaming = isinstance(dataset, datasets.IterableDataset)
        given.arguments["args"] = args = copy.copy(args)  # not dataclasses.replace: __post_init__ has effects
        if not streaming:
            args.dataset_num_proc = workers(args.dataset_num_proc, len(dataset))
        try:
            with showing(args):
                ready = (self._labelled if "packing" in given.arguments else self._differing)(
                    prepare, given, counts, name
                )
        except UserError:
            raise
        except UnrenderedRow as error:
            raise _unrendered(error.index + 1, error.reason, name) from error
        except Exception as error:
            if not streaming:
                _blame_row(dataset, name, counts, error)
            raise
        if next(iter(ready), None) is None:
            format = self.rows_report.format
            compared = format.compares(_columns(dataset)) if format is not None and counts.streaming else ()
            raise _nothing_left(name, counts, compared)
        return ready

    def _differing(self, prepare: Any, given: inspect.BoundArguments, counts: SplitReport, name: str) -> Any:
        """Prepare in one call, and drop what trains nothing: pairs with equal sides."""
        dataset, args, format = given.arguments["dataset"], given.arguments["args"], self.rows_report.format
        comparing = format is not None and bool(format.compares(_columns(dataset)))
        if comparing:
            given.arguments["dataset"] = equal.with_numbers(dataset, counts.places)
        kl = getattr(self, "calculate_KL", None)  # of KTO
        ready = tokenized = self._tokenized(prepare, given, counts, name)
        if ready is None:
            if kl is not None:
                args.dataset_num_proc = None  # in parts, batches of the KL estimate would end elsewhere
                if comparing:
                    given.arguments["dataset"] = unpairing.by_trl(given.arguments["dataset"], args.seed)
            ready = prepare(*given.args)
        found = self._recognised(ready, whole=False)
        if isinstance(dataset, datasets.IterableDataset):
            return equal.dropped_arriving(ready, name, found, args) if comparing else ready
        lost = max(0, len(dataset) - len(ready))
        if comparing:
            ready, counts.equal_rows = equal.dropped(ready, name, found, args, len(dataset))
        if found is not None:
            _note(counts, found, ready, args)
        if found is not None and found.drops_long:
            counts.long_rows = lost
        else:
            counts.lost_rows = lost
        if tokenized is not None and kl is not None:
            ready = unpairing.labelled_completions(name, ready, args, kl=kl)
        if kl and name == "train" and (remark := unpairing.order(ready)) is not None:
            self.rows_report.notes.append(f"{name}: {remark}")
        return ready

    def _labelled(self, prepare: Any, given: inspect.BoundArguments, counts: SplitReport, name: str) -> Any:
        """Prepare in two calls: tokenized and labelled; then, without rows that have no label, truncated or packed."""
        args, packing = given.arguments["args"], given.arguments["packing"]
        if (whole := self._tokenized(prepare, given, counts, name)) is None:
            untouched = copy.copy(args)
            untouched.max_length, untouched.shuffle_dataset = None, False
            given.arguments.update(args=untouched, packing=False)
            whole = prepare(*given.args)
        # An evaluation may be packed where training is not.
        counting = copy.copy(args)
        counting.packing = packing
        found = self._recognised(whole, whole=True)
        streaming = isinstance(whole, datasets.IterableDataset)
        if found is not None and found.labelled is not None and streaming:
            whole = whole.filter(found.labelled, fn_kwargs={"args": counting})
        elif found is not None and not streaming:
            whole = _without(whole, _note(counts, found, whole, counting))
        if next(iter(whole), None) is None:
            raise _nothing_left(name, counts)
        args = copy.copy(args)
        args.dataset_num_proc = None  # packing in parts gives other sequences
        if found is not None and not streaming and not packing:
            if counts.truncated:
                cut = Truncated(args.max_length, keep_end=args.truncation_mode == "keep_end")
                whole = mapped(f"truncating {name}", whole, cut)
            args.max_length = None
        given.arguments.update(dataset=whole, args=args, packing=packing, formatting_func=None)
        ready = prepare(*given.args)
        if packing and streaming:
            return ready.filter(_any_label)
        if packing:
            ready = _without(ready, unlabelled_packs(ready))
            counts.packed = len(ready)
        return ready

    def _tokenized(
        self, prepare: Any, given: inspect.BoundArguments, counts: SplitReport, name: str
    ) -> Any | None:
        """The rows with the columns that TRL's own preparation adds; None where it must add them itself."""
        dataset, args = given.arguments["dataset"], given.arguments["args"]
        tokenize = tokenizing(self, prepare, given.arguments, counts.check)
        if tokenize is None:
            return None
        if isinstance(tokenize, Pairs | Answers) and "prompt" not in dataset.column_names:
            dataset = mapped(f"finding prompts of {name}", dataset, extract_prompt, args.dataset_num_proc)
        ready = mapped(f"tokenizing {name}", dataset, tokenize, args.dataset_num_proc)
        if LEFT_OUT in ready.column_names:
            if cut := rows_above_zero(ready, LEFT_OUT):
                self.rows_report.notes.append(
                    f"{name}: in {plural(cut, 'row')} the prompt ends in other tokens than before a completion; "
                    "a model that answers it alone is asked something that it was not trained on"
                )
            ready = ready.remove_columns(LEFT_OUT)
        return ready

    def _recognised(self, dataset: Any, *, whole: bool) -> Prepared | None:
        format = self.rows_report.format
        found = recognise(_columns(dataset), KNOWN if format is None else format.prepared)
        return found if found is not None and found.whole == whole else None


def counted(trainer_cls: type, report: DataReport) -> type:
    """A subclass of a TRL trainer with :class:`CountedRows` over it; a class that prepares nothing is returned."""
    trainer_cls = prepared_as_dpo(trainer_cls)
    if not hasattr(trainer_cls, "_prepare_dataset"):
        return trainer_cls
    body = {"rows_report": report, "__doc__": trainer_cls.__doc__, "__module__": trainer_cls.__module__}
    return type(trainer_cls.__name__, (CountedRows, trainer_cls), body)


def _columns(dataset: Any) -> Collection[str]:
    return dataset.column_names or next(iter(dataset), {})


def _note(counts: SplitReport, found: Prepared, dataset: Any, args: Any) -> Sequence[int]:
    """Put the counts of prepared rows into ``counts``; return the places of those without a label."""
    counted_rows = found.count(dataset, args)
    counts.tokens, counts.truncated = counted_rows.tokens, counted_rows.truncated
    counts.lost_rows = len(counted_rows.unlabelled)
    return counted_rows.unlabelled


def _without(dataset: Any, places: Sequence[int]) -> Any:
    return dataset.select(np.delete(np.arange(len(dataset)), places)) if places else dataset


def _any_label(row: Mapping[str, Any]) -> bool:
    return any(label != IGNORED for label in row["labels"])


def _nothing_left(name: str, counts: SplitReport, compared: Sequence[str] = ()) -> UserError:
    if counts.long_rows:
        return UserError(f"every row is longer than `max_length` {counts.max_length}; raise it", split=name)
    cut = "" if counts.max_length is None else f" after truncation to max_length {counts.max_length}"
    if compared:
        return UserError(
            f"no row is left: {' and '.join(compared)} train the same tokens, or none{cut}\n"
            "  raise `max_length`, shorten the prompts, or mend the pairs",
            split=name,
        )
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
        raise _unrendered(*refused, name) from error


def _unrendered(number: int, reason: str, name: str) -> UserError:
    return UserError(f"the chat template cannot render it: {reason}", split=name, row=number)


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
