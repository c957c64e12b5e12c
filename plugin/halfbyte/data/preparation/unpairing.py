"""The columns that TRL's KTO trainer makes of rows: labelled completions, and others' completions for the KL estimate.

The classes are functions from a batch to the arrow table that takes its place, as those of
:mod:`halfbyte.data.preparation.tokenizing`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from trl.data_utils import extract_prompt, unpair_preference_dataset

from halfbyte.data.preparation.encoding import Encoder
from halfbyte.data.preparation.mapping import ROWS, mapped
from halfbyte.data.preparation.tables import (
    EDITION,
    LEFT_OUT,
    alike,
    appended,
    ended,
    joined,
    list_of,
    lists,
    row_options,
)

KL = "KL_completion_ids"
_OF_THE_PAIR = {
    "prompt",
    "chosen",
    "rejected",
    "label",
    "prompt_ids",
    "chosen_ids",
    "rejected_prompt_ids",
    "rejected_ids",
}
# A sorted file changes its label this much less often than a shuffled one would, where it is noticed.
_SORTED = 0.1


@dataclass(frozen=True)
class Answers:
    """A prompt with each of its answers: ``completion``, or ``chosen`` and ``rejected``.

    An answer begins where it and the prompt before it differ from the prompt alone. Rows whose prompt fills
    ``max_length`` are dropped.
    """

    tokenizer: Any
    conversational: bool
    names: tuple[str, ...]
    max_length: int | None = None
    edition: int = EDITION

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @property
    def _columns(self) -> list[tuple[str, str]]:
        """The columns of each answer: its prompt's and its own."""
        prompts = ("prompt_ids", "rejected_prompt_ids")
        return [(prompt, f"{name}_ids") for prompt, name in zip(prompts, self.names, strict=False)]

    def features(self, given: datasets.Features) -> datasets.Features:
        """The features of the result, from those of the rows."""
        added = {column: list_of("int64") for columns in self._columns for column in columns}
        return datasets.Features({**given, **added, LEFT_OUT: datasets.Value("int32")})

    def __call__(self, batch: Any, indices: Sequence[int]) -> pa.Table:
        """Tokenize the rows at ``indices``. Raises UnrenderedRow."""
        table, encoder, prompts = batch.pa_table, self._encoder, batch["prompt"]
        if self.conversational:
            answers = zip(*(batch[name] for name in self.names), strict=True)
            sides = [
                [prompt, *(prompt + each for each in row)]
                for prompt, row in zip(prompts, answers, strict=True)
            ]
            rows = encoder.conversations(indices[0], row_options(batch), sides, prompted=True)
        else:
            for name in self.names:
                table = ended(table, name, self.tokenizer.eos_token)
            columns = (encoder.texts(joined(prompts, table[name].to_pylist())) for name in self.names)
            rows = [list(row) for row in zip(encoder.texts(prompts), *columns, strict=True)]
        starts = np.array([[alike(prompt, each) for each in wholes] for prompt, *wholes in rows])
        for at, (before, own) in enumerate(self._columns, 1):
            parts = [
                (row[at][:start], row[at][start:]) for row, start in zip(rows, starts[:, at - 1], strict=True)
            ]
            table = appended(table, **{before: lists([p for p, _ in parts], "int64")})
            table = appended(table, **{own: lists([a for _, a in parts], "int64")})
        left_out = [len(row[0]) - start for row, start in zip(rows, starts.min(axis=1), strict=True)]
        table = appended(table, **{LEFT_OUT: pa.array(left_out, type=pa.int32())})
        if self.max_length is None:
            return table
        return table.filter(pa.array(starts.max(axis=1) < self.max_length))


@dataclass(frozen=True)
class Unpaired:
    """Two rows of each tokenized pair, the chosen answers of a batch before its rejected ones."""

    edition: int = EDITION

    def features(self, given: datasets.Features) -> datasets.Features:
        """The features of the result, from those of the pairs."""
        added = {
            "label": datasets.Value("bool"),
            "prompt_ids": list_of("int64"),
            "completion_ids": list_of("int64"),
        }
        return datasets.Features({**{name: given[name] for name in _beside(given)}, **added})

    def __call__(self, batch: Any, indices: Sequence[int]) -> pa.Table:
        """Split the pairs of a batch."""
        table = batch.pa_table
        beside = table.select(_beside(table.column_names))
        sides = [
            appended(
                beside,
                label=pa.array([wanted] * len(table)),
                prompt_ids=table[prompt],
                completion_ids=table[own],
            )
            for wanted, prompt, own in (
                (True, "prompt_ids", "chosen_ids"),
                (False, "rejected_prompt_ids", "rejected_ids"),
            )
        ]
        return pa.concat_tables(sides)


@dataclass(frozen=True)
class Mismatched:
    """Each row with the completion of the row before it in its batch of ``size``: the first has that of the last."""

    size: int
    edition: int = EDITION

    @property
    def rows(self) -> int:
        """Rows of whole batches."""
        return self.size * max(1, ROWS // self.size)

    def features(self, given: datasets.Features) -> datasets.Features:
        """The features of the result, from those of the rows."""
        return datasets.Features({**given, KL: list_of("int64")})

    def __call__(self, batch: Any, indices: Sequence[int]) -> pa.Table:
        """Add the column to a batch that begins where a batch of the trainer does."""
        table = batch.pa_table
        places = np.arange(len(table))
        others = places - 1
        first = places % self.size == 0
        others[first] = np.minimum(places[first] + self.size, len(table)) - 1
        return table.append_column(KL, table["completion_ids"].take(pa.array(others)))


def labelled_completions(name: str, dataset: Any, args: Any, *, kl: bool) -> Any:
    """The rows that KTO trains on, of tokenized ones: pairs as two rows, in an order that ``seed`` decides.

    TRL puts the chosen answers of 1000 pairs before the rejected ones, and trains rows in their order. With ``kl`` each
    row has the completion that the KL estimate pairs with its prompt: TRL's rotation within a batch of
    ``per_device_train_batch_size``, made by one process, as batches do not end where the parts of several would.
    """
    if "rejected_prompt_ids" in dataset.column_names:
        dataset = mapped(f"unpairing {name}", dataset, Unpaired()).shuffle(seed=args.seed)
    if not kl:
        return dataset
    return mapped(
        f"pairing {name} for the KL estimate", dataset, Mismatched(args.per_device_train_batch_size)
    )


def by_trl(dataset: Any, seed: int) -> Any:
    """The pairs of a Dataset as TRL unpairs them, before any is tokenized, in an order that ``seed`` decides."""
    if "prompt" not in dataset.column_names:
        dataset = mapped("finding prompts", dataset, extract_prompt)
    if "label" in dataset.column_names:  # it would take the place of the new one
        dataset = dataset.remove_columns("label")
    return unpair_preference_dataset(dataset).shuffle(seed=seed)


def order(dataset: Any) -> str | None:
    """What to report of rows that stand together by their label, or None."""
    labels = np.asarray(dataset["label"][:], dtype=bool)
    wanted = int(labels.sum())
    changes = int((labels[1:] != labels[:-1]).sum())
    expected = 2 * wanted * (len(labels) - wanted) / max(1, len(labels))  # in a shuffled order
    if changes >= _SORTED * expected:
        return None
    return "rows of one label stand together, and KTO trains rows in their order; shuffle them in the data"


def _beside(columns: Iterable[str]) -> list[str]:
    """The columns that both rows of a pair keep."""
    return [name for name in columns if name not in _OF_THE_PAIR]
