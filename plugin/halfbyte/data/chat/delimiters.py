"""The chat template's turn delimiters inside messages, where they would forge a turn.

A tokenizer turns the text ``<|im_end|>`` into the end of a turn, also inside a message. Other added tokens, such as
``<think>``, may occur in messages and are only counted.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from halfbyte.data import glance
from halfbyte.data.chat.forged import BESIDE, NAME, Turns, broken, opened, strings
from halfbyte.data.chat.rendering import rendered
from halfbyte.data.chat.template import SPECIAL
from halfbyte.data.formats import Layout
from halfbyte.data.nested import loosened
from halfbyte.data.report import DataReport
from halfbyte.data.rows import numbered
from halfbyte.data.sample import first_numbers
from halfbyte.errors import UserError

# The contents of a probe's messages; everything else in the rendered text comes from the template.
_USER, _ASSISTANT, _OTHER = "7fae1", "7fae2", "7fae3"
_WORDS = re.compile("7fae[123]")
_TAG = re.compile(r"</?(\w+)>")
# A template without tokens of its own marks turns by text: marks that look like tokens, else lines that have such a
# character. Words alone ("User:") are too common to refuse, and tags of what is thought or called are no turns.
_TEXT_MARK = re.compile(rf"{SPECIAL.pattern}|\[/?[A-Z_]{{3,}}\]|<</?SYS>>")
_MARK = re.compile(r"[<\[|#{]")
_ASIDE = re.compile(r"(?:</?(?:think|reason|thought|tool)\w*>\s*)+")
_ROLES = ("role", "from")
_BEGINNINGS = 64  # of added tokens, for which one pattern is fast


def turn_delimiters(tokenizer: Any, template: str | None = None) -> tuple[str, ...]:
    """Return what the chat template writes around turns: added tokens, or text where it uses none.

    A pair of tags such as ``<think>`` and ``</think>`` that the tokenizer does not mark as special is no delimiter,
    although templates write an empty one.
    """
    gaps = [gap for text in _probes(tokenizer, template) for gap in _WORDS.split(text)]
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    found = Counter(token for gap in gaps for token in _pattern(added).findall(gap)) if added else Counter()
    tokens = {token for token in found if added[token] or not _is_tag(token, added)}
    rest = [line.strip() for gap in gaps for line in _pattern(added).sub("\n", gap).splitlines()]
    marks = {mark[0] for line in rest for mark in _TEXT_MARK.finditer(line)}
    # Those that begin and end a text say nothing of who speaks: the template says it in words.
    if not marks and tokens <= {tokenizer.bos_token, tokenizer.eos_token}:
        marks = {line for line in rest if len(line) > 2 and _MARK.search(line) and not _ASIDE.fullmatch(line)}
    return tuple(sorted(tokens | marks))


def settle(
    split: str,
    dataset: Any,
    layout: Layout,
    tokenizer: Any,
    policy: str,
    report: DataReport,
    template: str | None = None,
    places: np.ndarray | None = None,
) -> Any:
    """Return the split with delimiters in its messages and tools handled by ``policy``; note counts in ``report``.

    With ``error`` a delimiter raises UserError with its row; ``escape`` puts a
    space after its first character; ``allow`` leaves it. A stream is handled as it is read, and not counted.
    ``places`` are those of the rows of a sample.
    """
    check = _Check(turn_delimiters(tokenizer, template), tokenizer, template, layout, policy)
    if isinstance(dataset, datasets.IterableDataset):  # a later file may have what the first row has not
        return _arriving(split, dataset, [*layout.spoken, *BESIDE], check, policy)
    columns = [*layout.spoken, *(name for name in BESIDE if name in dataset.column_names)]
    rows: list[int] = []
    turns: Counter[str] = Counter()
    others: Counter[str] = Counter()
    doing = f"looking for turn delimiters in {split}"
    for number, row in numbered(dataset, columns, doing=doing, doubtful=check.doubtful):
        held = check.count(row, columns)
        if inside := {token: count for token, count in held.items() if token in check.delimiters}:
            rows.append(number)
            turns.update(inside)
        others.update({token: count for token, count in held.items() if token not in check.delimiters})
    if others:
        report.notes.append(f"{split}: added tokens in messages, trained unchanged: {_counts(others)}")
    if not rows:
        return dataset
    if policy == "error":
        where = first_numbers(places, rows)
        raise _forged(_counts(turns), split, among=f"{len(rows):,} of {len(dataset):,} rows ({where}): ")
    done = "escaped" if policy == "escape" else "unchanged"
    report.notes.append(
        f"{split}: turn delimiters in messages of {len(rows):,} rows {done}: {_counts(turns)}"
    )
    if policy == "escape":
        dataset = dataset.map(
            lambda row: check.escaped(row, columns),
            features=loosened(dataset.features, columns),
        )
        for number, row in numbered(dataset, columns, doing=doing, doubtful=check.doubtful):
            _refuse_rest(split, number, check, row, columns)
    return dataset


def _arriving(split: str, stream: Any, columns: Sequence[str], check: "_Check", policy: str) -> Any:
    if policy == "allow":
        return stream

    def treat(row: dict[str, Any], index: int) -> dict[str, Any]:
        if policy == "escape":
            row = {**row, **check.escaped(row, columns)}
        _refuse_rest(split, index + 1, check, row, columns)
        return row

    return (
        stream.map(treat, with_indices=True, features=loosened(stream.features, columns))
        if check.delimiters
        else stream
    )


def _refuse_rest(
    split: str, number: int, check: "_Check", row: Mapping[str, Any], columns: Sequence[str]
) -> None:
    """Refuse a row with delimiters: with ``escape``, those that appear when the parts of a message are joined."""
    if held := {t: n for t, n in check.count(row, columns).items() if t in check.delimiters}:
        raise _forged(_counts(Counter(held)), split, row=number)


class _Check:
    """Counts added tokens and delimiters in the messages of a row."""

    def __init__(
        self, delimiters: tuple[str, ...], tokenizer: Any, template: str | None, layout: Layout, policy: str
    ) -> None:
        self.delimiters = frozenset(delimiters)
        self._turns = Turns(tokenizer, template, layout, () if policy == "allow" else delimiters)
        self._spoken, self._delimiting = layout.spoken, _pattern(delimiters)
        added = tokenizer.added_tokens_decoder.values()
        self._pattern = _pattern([*(token.content for token in added), *delimiters])
        # A token that is matched after normalization may be written with other characters.
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        altered = [t.content for t in added if t.normalized and t.content in self.delimiters]
        self._ids: dict[int, str] = {}
        if normalizer is not None and altered:
            self._ids = dict(zip(tokenizer.convert_tokens_to_ids(altered), altered, strict=True))
        self._tokenizer = tokenizer
        begins = {text[:3] for text in (*(token.content for token in added), *delimiters)}
        self._hint: str | None = None
        if self._turns.hint is not None and not self._ids and len(begins) <= _BEGINNINGS:
            self._hint = "|".join([*filter(None, [self._turns.hint]), *map(re.escape, sorted(begins))])

    def doubtful(self, table: pa.Table, begin: int) -> np.ndarray | None:
        """Which rows of a batch may hold one, as far as Arrow shows it; see :mod:`halfbyte.data.glance`."""
        found = np.zeros(len(table), bool)
        for name in table.column_names:
            array = glance.column(table, name)
            if name not in self._spoken:
                found |= ~glance.nulls(array)
                continue
            turns = glance.turns(array)
            if self._hint is None or turns is None or not all(map(NAME.fullmatch, turns.keys)):
                return None
            for key, held in turns.keys.items():
                text = glance.is_text(held.type)
                if (
                    text
                    and key in _ROLES
                    and all(NAME.fullmatch(who or "a") for who in held.unique().to_pylist())
                ):
                    continue
                found |= turns.rows(glance.matches(held, self._hint) if text else ~glance.nulls(held))
        return found

    def count(self, row: Mapping[str, Any], columns: Sequence[str]) -> Counter[str]:
        found: Counter[str] = Counter()
        for column in columns:
            value = opened(row, column) or ()
            spoken = column in self._spoken
            for text in (t for message in value for t in _texts(message)) if spoken else strings(value):
                found.update(self._pattern.findall(text))
                if self._ids:
                    ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
                    hidden = Counter(self._ids[token] for token in ids if token in self._ids)
                    found |= hidden
        if not any(token in self.delimiters for token in found):
            found |= self._turns.forged(row, columns)
        return found

    def escaped(self, row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
        """The columns of a row with its delimiters broken up; `tools` as JSON text stay text."""
        found = {c: broken(opened(row, c), self._delimiting) for c in columns if c in row}
        return {
            c: json.dumps(v) if isinstance(row[c], str) and not isinstance(v, str) else v
            for c, v in found.items()
        }


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a message but its role; the parts of a list joined, as templates do."""
    for key, value in message.items():
        if key not in _ROLES and value is not None:
            yield "".join(strings(value))


def _probes(tokenizer: Any, template: str | None) -> Iterator[str]:
    """Short conversations as the template renders them; those that it refuses are left out."""
    user = {"role": "user", "content": _USER}
    assistant = {"role": "assistant", "content": _ASSISTANT}
    beside = [{"role": role, "content": _OTHER} for role in ("system", "tool")]
    for turns, prompt in (
        ([user, assistant, user, assistant], False),
        ([user], True),
        ([beside[0], user, assistant], False),
        ([user, assistant, beside[1], assistant], False),
    ):
        text = rendered(tokenizer, turns, template, add_generation_prompt=prompt)
        if text is not None:
            yield text


def _is_tag(token: str, added: Mapping[str, bool]) -> bool:
    """Whether a token is one of a pair such as ``<think>`` and ``</think>``."""
    name = _TAG.fullmatch(token)
    return name is not None and {f"<{name[1]}>", f"</{name[1]}>"} <= added.keys()


def _pattern(tokens: Any) -> re.Pattern[str]:
    longest_first = sorted({token for token in tokens if token}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _counts(found: Counter[str]) -> str:
    shown = ", ".join(f"{token} {count:,}" for token, count in found.most_common(5))
    return shown + (", ..." if len(found) > 5 else "")


def _forged(counts: str, split: str, *, among: str = "", row: int | None = None) -> UserError:
    return UserError(
        f"{among}turn delimiters of the chat template inside messages: {counts}\n"
        "  the model reads them as the end of a turn and the start of another; remove them from the data,\n"
        "  or write `user_special_tokens: escape` to break them up, or `allow` to train on them unchanged",
        split=split,
        row=row,
    )
