"""Rows as the trainer will see them: rendered, tokenized and truncated, masked tokens told apart from trained ones."""

import copy
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from halfbyte.data.sample import Sample
from halfbyte.errors import UserError
from halfbyte.fast.pairs import common_prefix
from halfbyte.plan.rehearsal import Rehearsal
from halfbyte.terminal.streams import printable
from halfbyte.terminal.wording import plural

_IGNORED = -100
_TRAINED, _MASKED = "bold green", "dim"
# What the sides of a pair are called, in the order of a batch, and the sequence of any other row.
_SIDES = ("chosen", "rejected")
_ALONE = "row"


@dataclass(frozen=True)
class Tokens:
    """One sequence of a row: its token ids, which of them the loss is on, and how many were cut off."""

    name: str
    ids: list[int]
    trained: list[bool]
    cut: int = 0


@dataclass(frozen=True)
class Preview:
    """A row by its number, counted from 1: its sequences, or why the trainer leaves it out."""

    row: int
    sequences: tuple[Tokens, ...] = ()
    left_out: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in JSON's types."""
        return asdict(self)


def previews(rehearsal: Rehearsal, rows: Iterable[int]) -> list[Preview]:
    """Return the previews of ``rows``, counted from 1; raises :class:`UserError` for a row that there is not."""
    return [_preview(rehearsal, number) for number in rows]


def lines(preview: Preview, tokenizer: Any) -> Iterator[Text]:
    """Return what is printed of a row: trained tokens in a color and in brackets, special tokens as they are."""
    if preview.left_out is not None:
        yield Text(f"row {preview.row}: left out: {preview.left_out}")
        return
    shared = common_prefix(*(each.ids for each in preview.sequences)) if len(preview.sequences) > 1 else 0
    told = ", ".join(
        f"{'' if each.name == _ALONE else f'{each.name} '}"
        f"{plural(len(each.ids), 'token')}, {sum(each.trained):,} trained"
        for each in preview.sequences
    )
    yield Text(f"row {preview.row}: {told}", style="bold")
    if shared:
        yield Text(f"  shared by both sides, {plural(shared, 'token')}:", style="italic")
        yield _rendered(preview.sequences[0], slice(0, shared), tokenizer)
    for each in preview.sequences:
        if len(preview.sequences) > 1:
            yield Text(f"  {each.name}:", style="italic")
        yield _rendered(each, slice(shared, len(each.ids)), tokenizer)
        if each.cut:
            yield Text(f"  ... {plural(each.cut, 'token')} cut off by max_length", style="yellow")


def show(rehearsal: Rehearsal, rows: Iterable[int]) -> list[Preview]:
    """Print the previews of ``rows`` and return them."""
    found = previews(rehearsal, rows)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print(
        "trained tokens are in [[ ]], the others are masked; special tokens are shown", markup=False
    )
    for each in found:
        for line in lines(each, rehearsal.tokenizer):
            console.print(line)
    return found


def _preview(rehearsal: Rehearsal, number: int) -> Preview:
    try:
        kept = _sequences(rehearsal, number)
    except UserError as error:
        # No row is left: this one is dropped. All else would stop a run.
        if error.option is not None or error.row is not None or error.split is None:
            error.row = number if error.row is not None else None
            raise
        return Preview(number, left_out=error.what.splitlines()[0])
    whole = _sequences(_untruncated(rehearsal), number)
    return Preview(
        number,
        tuple(
            replace(each, cut=max(len(full.ids) - len(each.ids), 0))
            for each, full in zip(kept, whole, strict=True)
        ),
    )


def _untruncated(rehearsal: Rehearsal) -> Rehearsal:
    args = copy.copy(rehearsal.options.args)
    if getattr(args, "max_length", None) is not None:
        args.max_length = None
    return replace(rehearsal, options=replace(rehearsal.options, args=args))


def _sequences(rehearsal: Rehearsal, number: int) -> list[Tokens]:
    """The sequences of one row, as the trainer's own collator makes them."""
    args = copy.copy(rehearsal.options.args)
    args.eval_strategy = "no"
    if getattr(args, "packing", False):
        args.packing = False  # a packed sequence is several rows, each as it is here
        if args.packing_strategy != "bfd":  # which cuts rows; the others go on in the next sequence
            args.max_length = None
    alone = replace(rehearsal, options=replace(rehearsal.options, args=args))
    rows = alone.rows(Sample(only=[number - 1]))
    if rows.report.train.whole is None:
        raise UserError(
            "no row by its number in a stream; preview rows of a file", option="dataset_streaming"
        )
    trainer = alone.trainer(rows, few=True)
    example = trainer.train_dataset[0]
    collator: Any = trainer.data_collator
    batch = getattr(collator, "padded", collator)([example])
    if "input_ids" not in batch:
        return list(_of_columns(trainer.train_dataset))
    ids = batch["input_ids"].tolist()
    attended = _rows(batch.get("attention_mask"), [[1] * len(each) for each in ids])
    on = batch["labels"] != _IGNORED if "labels" in batch else batch.get("completion_mask")
    trained = _rows(on, [[0] * len(each) for each in ids])
    names = (_ALONE,) if len(ids) == 1 else _SIDES
    return [
        Tokens(
            name,
            [token for token, there in zip(of, mask, strict=True) if there],
            # Nothing predicts the first token of a sequence.
            [
                bool(flag) and place > 0
                for place, (flag, there) in enumerate(zip(loss, mask, strict=True))
                if there
            ],
        )
        for name, of, mask, loss in zip(names, ids, attended, trained, strict=True)
    ]


def _rows(tensor: Any, otherwise: list[list[int]]) -> list[list[int]]:
    return otherwise if tensor is None else tensor.tolist()


def _of_columns(dataset: Any) -> Iterator[Tokens]:
    """The completions of a trainer whose collator returns them under names of its own."""
    for example in dataset:
        prompt, completion = list(example["prompt_ids"]), list(example["completion_ids"])
        yield Tokens(_ALONE, prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _rendered(sequence: Tokens, part: slice, tokenizer: Any) -> Text:
    text = Text()
    pairs = zip(sequence.ids[part], sequence.trained[part], strict=True)
    for trained, group in groupby(pairs, key=lambda pair: pair[1]):
        said = printable(tokenizer.decode([token for token, _ in group], skip_special_tokens=False))
        text.append(f"[[{said}]]" if trained else said, style=_TRAINED if trained else _MASKED)
    return text
