"""The columns that TRL's SFT, DPO and KTO trainers make of rows, made in batches and by several processes.

Each class is a function from a batch to the arrow table that takes its place, for ``Dataset.map``; all its fields are
part of the name under which the result is cached. Source: ``_prepare_dataset`` of ``trl/trainer/sft_trainer.py``,
``dpo_trainer.py`` and ``kto_trainer.py`` (1.16), which make the same columns row by row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from halfbyte.data.preparation.encoding import Encoder, batches_alike
from halfbyte.data.preparation.tables import (
    EDITION,
    LEFT_OUT,
    alike,
    appended,
    ended,
    joined,
    labelled,
    list_of,
    lists,
    row_options,
)
from halfbyte.data.preparation.unpairing import Answers

_SFT = "trl.trainer.sft_trainer.SFTTrainer._prepare_dataset"
_DPO = "trl.trainer.dpo_trainer.DPOTrainer._prepare_dataset"
_KTO = "trl.trainer.kto_trainer.KTOTrainer._prepare_dataset"
_ADDED = {
    *(LEFT_OUT, "input_ids", "labels", "completion_mask", "prompt_ids", "chosen_ids", "rejected_ids"),
    *("completion_ids", "KL_completion_ids", "rejected_prompt_ids"),
}
_DECIDING = {"prompt", "completion", "chosen", "rejected", "messages", "conversations"}


def tokenizing(
    trainer: Any, prepare: Any, given: Mapping[str, Any], check: Any
) -> "Sequences | Pairs | Answers | None":
    """What makes the columns that ``prepare``, a trainer's ``_prepare_dataset``, would make of ``given`` rows.

    None where that is another method than TRL's, or rows or a tokenizer that are not read here: ``check`` is the
    :class:`RowCheck` that the rows passed.
    """
    tokenizer, args, dataset = given["processing_class"], given["args"], given["dataset"]
    if isinstance(dataset, datasets.IterableDataset):
        return None
    columns = set(dataset.column_names)
    if check is None or not batches_alike(tokenizer) or columns & _ADDED:
        return None
    method, layout = f"{prepare.__module__}.{prepare.__qualname__}", set(check.layout.columns)
    if layout & _DECIDING != columns & _DECIDING:
        return None
    if method == _SFT and given.get("formatting_func") is None:
        known: list[set[str]] = [{"prompt", "completion"}, {"messages"}, {args.dataset_text_field}]
        made = Sequences(
            tokenizer,
            check.conversational,
            args.dataset_text_field,
            trainer.chat_template,
            args.assistant_only_loss,
            trainer.completion_only_loss,
        )
        return made if layout in known else None
    if method == _DPO:
        fills = args.max_length if args.truncation_mode == "keep_start" else None
        known = [{"prompt", "chosen", "rejected"}, {"chosen", "rejected"}]
        return Pairs(tokenizer, check.conversational, fills) if layout in known else None
    if method == _KTO:
        names = ("completion",) if "completion" in layout else ("chosen", "rejected")
        return Answers(tokenizer, check.conversational, names, args.max_length)
    return None


@dataclass(frozen=True)
class Sequences:
    """Labelled sequences as ``SFTTrainer`` makes them, before it truncates or packs any.

    ``template`` is the trainer's chat template, None for the tokenizer's. With ``completion_only`` prompts have no
    label, with ``assistant_only`` nothing has one but what the assistant says.
    """

    tokenizer: Any
    conversational: bool
    text_field: str
    template: str | None = None
    assistant_only: bool = False
    completion_only: bool = False
    edition: int = EDITION

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.template)

    def features(self, given: datasets.Features) -> datasets.Features:
        """The features of the result, from those of the rows."""
        added: dict[str, Any] = {"input_ids": list_of("int32")}
        if "prompt" in given:
            added |= {} if self.completion_only else {"completion_mask": list_of("int64")}
            added[LEFT_OUT] = datasets.Value("int32")
        return datasets.Features({**given, **added, "labels": list_of("int64")})

    def __call__(self, batch: Any, indices: Sequence[int]) -> pa.Table:
        """Tokenize the rows at ``indices``. Raises UnrenderedRow."""
        table, encoder = batch.pa_table, self._encoder
        prompted = "prompt" in table.column_names
        if not self.conversational:
            table = ended(table, "completion" if prompted else self.text_field, self.tokenizer.eos_token)
        if prompted:
            return self._completions(batch, table, indices[0], encoder)
        masks = None
        if not self.conversational:
            ids = encoder.texts(table[self.text_field].to_pylist())
        elif self.assistant_only:
            ids, masks = encoder.masked(indices[0], row_options(batch), batch["messages"])
        else:
            sides = [[messages] for messages in batch["messages"]]
            ids = [row[0] for row in encoder.conversations(indices[0], row_options(batch), sides)]
        return appended(table, input_ids=lists(ids, "int32"), labels=labelled(ids, masks))

    def _completions(self, batch: Any, table: pa.Table, first: int, encoder: Encoder) -> pa.Table:
        prompts, masks = batch["prompt"], None
        if not self.conversational:
            heads = encoder.texts(prompts)
            ids = encoder.texts(joined(prompts, table["completion"].to_pylist()))
        else:
            whole, options = joined(prompts, batch["completion"]), row_options(batch)
            sides = [[prompt] for prompt in prompts]
            if not self.assistant_only:
                sides = [[*side, turns] for side, turns in zip(sides, whole, strict=True)]
            found = encoder.conversations(first, options, sides, prompted=True)
            heads, ids = [row[0] for row in found], [row[-1] for row in found]
            if self.assistant_only:
                ids, masks = encoder.masked(first, options, whole)
        starts = [alike(head, each) for head, each in zip(heads, ids, strict=True)]
        completion = [
            [0] * start + [1] * (len(each) - start) for start, each in zip(starts, ids, strict=True)
        ]
        left_out = [len(head) - start for head, start in zip(heads, starts, strict=True)]
        added = {"input_ids": lists(ids, "int32")}
        used = [masks] if masks is not None else []
        if self.completion_only:
            used.append(completion)
        else:
            added["completion_mask"] = lists(completion, "int64")
        added[LEFT_OUT] = pa.array(left_out, type=pa.int32())
        return appended(table, **added, labels=labelled(ids, *used))


@dataclass(frozen=True)
class Pairs:
    """Prompts with a chosen and a rejected completion as ``DPOTrainer`` makes them.

    Rows whose prompt fills ``max_length``, where one is given, are dropped.
    """

    tokenizer: Any
    conversational: bool
    max_length: int | None = None
    edition: int = EDITION

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    def features(self, given: datasets.Features) -> datasets.Features:
        """The features of the result, from those of the rows."""
        added = {name: list_of("int64") for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        return datasets.Features({**given, **added, LEFT_OUT: datasets.Value("int32")})

    def __call__(self, batch: Any, indices: Sequence[int]) -> pa.Table:
        """Tokenize the rows at ``indices``. Raises UnrenderedRow."""
        table, encoder = batch.pa_table, self._encoder
        prompts, names = batch["prompt"], ("chosen", "rejected")
        if self.conversational:
            sides = [[p, p + c, p + r] for p, c, r in zip(prompts, *(batch[n] for n in names), strict=True)]
            rows = encoder.conversations(indices[0], row_options(batch), sides, prompted=True)
        else:
            for name in names:
                table = ended(table, name, self.tokenizer.eos_token)
            columns = (encoder.texts(joined(prompts, table[name].to_pylist())) for name in names)
            rows = [list(row) for row in zip(encoder.texts(prompts), *columns, strict=True)]
        starts = [min(alike(prompt, side) for side in sides) for prompt, *sides in rows]
        parts = [
            [prompt[:start], *(side[start:] for side in sides)]
            for start, (prompt, *sides) in zip(starts, rows, strict=True)
        ]
        added = {
            f"{name}_ids": lists([row[at] for row in parts], "int64")
            for at, name in enumerate(("prompt", *names))
        }
        left_out = [len(prompt) - start for start, (prompt, *_) in zip(starts, rows, strict=True)]
        table = appended(table, **added, **{LEFT_OUT: pa.array(left_out, type=pa.int32())})
        return (
            table if self.max_length is None else table.filter(pa.array(np.array(starts) < self.max_length))
        )


@dataclass(frozen=True)
class Truncated:
    """Labelled sequences cut to ``max_length``."""

    max_length: int
    keep_end: bool = False
    edition: int = EDITION

    def features(self, given: datasets.Features) -> datasets.Features:
        """The features of the result, those of the rows."""
        return given

    def __call__(self, batch: Any, indices: Sequence[int]) -> pa.Table:
        """Truncate the rows of a batch."""
        table = batch.pa_table
        lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        ends = np.cumsum(lengths)
        kept = np.minimum(lengths, self.max_length)
        starts = ends - (kept if self.keep_end else lengths)
        place = np.arange(ends[-1] if len(ends) else 0)
        row = np.repeat(np.arange(len(lengths)), lengths)
        inside = (place >= starts[row]) & (place < (starts + kept)[row])
        offsets = np.concatenate(([0], np.cumsum(kept)))
        for name in ("input_ids", "labels"):
            column = table[name].combine_chunks()
            values = column.flatten().to_numpy(zero_copy_only=False)[inside]
            cut = pa.ListArray.from_arrays(
                pa.array(offsets, pa.int32()), pa.array(values, column.type.value_type)
            )
            table = table.set_column(table.column_names.index(name), name, cut)
        return table
