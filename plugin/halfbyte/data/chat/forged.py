"""Turns counted in the rendered text: one check for delimiters that fields, tools or the template put together.

A row has as many delimiters as its messages need: as many as the same row with its texts replaced by a word. Only rows
that could have more are rendered for it: those with a piece of a delimiter at the edge of a text, with a text that the
template cuts or replaces, and all rows of a template that changes what it prints.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from halfbyte.data.chat.rendering import TEMPLATE_ERRORS, texts

Row = Mapping[str, Any]

_WORD = "7fae4"
NAME = re.compile(r"[A-Za-z_$][\w$-]*")
# Under these a template finds words of its own; no delimiter is one word.
_NAMING = frozenset({"role", "from", "type"})
_KEPT_KEYS = _NAMING | {"id", "tool_call_id"}
BESIDE = ("tools", "chat_template_kwargs")
_CODE = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_CUTS = re.compile(
    r"""(?:split|partition|replace|removeprefix|removesuffix|startswith|endswith)\(\s*(['"])(.+?)\1"""
)
_FOUND_IN = re.compile(r"""(['"])([^'"]+)\1\s+(?:not\s+)?in\b""")
_REPLACED = re.compile(r"""replace\(\s*(['"])(.+?)\1""")


class Turns:
    """Counts turn delimiters in the renderings of a row: those of its texts, and those that it must have."""

    def __init__(self, tokenizer: Any, template: str | None, layout: Any, delimiters: Sequence[str]) -> None:
        self._tokenizer, self._template, self._layout = tokenizer, template, layout
        self._pattern = re.compile(
            "|".join(map(re.escape, sorted(delimiters, key=len, reverse=True))) or "(?!)"
        )
        code = " ".join(_CODE.findall(str(template or tokenizer.chat_template)))
        cuts = {cut for _, cut in (*_CUTS.findall(code), *_FOUND_IN.findall(code)) if cut.strip("\\nrt \n")}
        self._triggers = tuple(cuts)
        replaced = {cut for _, cut in _REPLACED.findall(code)}
        kept = [cut for cut in cuts - replaced if not any(cut in d or d in cut for d in delimiters)]
        self._kept = (
            re.compile(f"({'|'.join(map(re.escape, sorted(kept, key=len, reverse=True)))})") if kept else None
        )
        folded = [_folded(each) for each in delimiters]
        self._heads = _pieces(folded, lambda d, n: d[:n])
        self._tails = _pieces(folded, lambda d, n: d[-n:])
        self._inner = {d[i:j] for d in folded for i in range(len(d)) for j in range(i + 1, len(d) + 1)}
        self._whole = re.compile("|".join(map(re.escape, folded)) or "(?!)")
        self._changes = bool(delimiters) and not self._prints_as_given()
        self.hint = self._hint(folded)

    def forged(self, row: Row, columns: Sequence[str]) -> Counter[str]:
        """The delimiters that the rendered row has too many."""
        if not self._suspect(row, columns):
            return Counter()
        found = self._count(row)
        for neutral in (self._neutral, self._broken):
            needed = self._count(
                {**row, **{c: neutral(opened(row, c)) for c in {*columns, *BESIDE} if row.get(c)}}
            )
            if needed is not None:
                return (found or Counter()) - needed
        return Counter()

    def _suspect(self, row: Row, columns: Sequence[str]) -> bool:
        if self._changes:
            return True
        begun = ended = False
        for text in (text for column in {*columns, *BESIDE} for text in strings(opened(row, column))):
            folded = _folded(text)
            if (
                self._whole.search(folded)
                or folded in self._inner
                or any(cut in text for cut in self._triggers)
            ):
                return True
            begun, ended = begun or folded.endswith(self._heads), ended or folded.startswith(self._tails)
        return begun and ended

    def _hint(self, folded: Sequence[str]) -> str | None:
        """A pattern in RE2's syntax that finds something in a text of every suspect row; None where it would in any.

        The first sign of a delimiter, what the template cuts by, or a text of nothing but signs of delimiters.
        """
        firsts, signs = {each[0] for each in folded}, {sign for each in folded for sign in each}
        if self._changes or any(sign.isalnum() or not sign.isascii() for sign in firsts):
            return None
        if any(sign.isalpha() and not sign.isascii() for sign in signs):
            return None
        signs |= {sign.upper() for sign in signs} | _folding_to_ascii()
        parts = [*map(re.escape, sorted({*firsts, *self._triggers}))]
        if folded:
            parts.append(rf"\A[\x00-\x20{''.join(map(re.escape, sorted(signs)))}]+\z")
        return "|".join(parts)

    def _count(self, row: Row) -> Counter[str] | None:
        try:
            rendered = list(texts(row, self._layout, self._tokenizer, self._template, prompts=False))
        except TEMPLATE_ERRORS:
            return None
        return Counter(token for text in rendered for token in self._pattern.findall(text))

    def _prints_as_given(self) -> bool:
        """Whether every character of a message is printed as it is."""
        text = "".join(f"{c}q" for c in string.ascii_letters + string.digits + string.punctuation)
        talk = [{"role": role, "content": f"{n}{text}"} for n, role in enumerate(("user", "assistant"))]
        try:
            rendered = self._tokenizer.apply_chat_template(talk, tokenize=False, chat_template=self._template)
        except TEMPLATE_ERRORS:
            return False
        return all(turn["content"] in rendered for turn in talk)

    def _neutral(self, value: Any, key: str = "") -> Any:
        """``value`` with a word in place of each text, and what the template cuts it by."""
        if isinstance(value, Mapping):
            return {
                name if NAME.fullmatch(name) else f"k{number}": self._neutral(item, name)
                for number, (name, item) in enumerate(value.items())
            }
        if isinstance(value, list):
            return [self._neutral(item, key) for item in value]
        if not isinstance(value, str) or not value.strip():
            return value
        if key in _KEPT_KEYS and NAME.fullmatch(value):
            return value
        if value.lstrip()[:1] in ("{", "["):
            try:
                return json.dumps(self._neutral(json.loads(value), key))
            except (ValueError, RecursionError):
                pass
        if self._kept is None:
            return _WORD
        return "".join(
            part if number % 2 or not part.strip() else _WORD
            for number, part in enumerate(self._kept.split(value))
        )

    def _broken(self, value: Any) -> Any:
        return broken(value, self._pattern)


def strings(value: Any) -> Iterator[str]:
    """Every text in a value, keys that are no plain names among them; roles and types that are plain say nothing."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not NAME.fullmatch(key):
                yield key
            if key not in _NAMING or not (isinstance(item, str) and NAME.fullmatch(item)):
                yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def broken(value: Any, pattern: re.Pattern[str]) -> Any:
    """``value`` with a space after the first character of whatever matches, in keys too."""
    if isinstance(value, str):
        return pattern.sub(lambda m: f"{m[0][0]} {m[0][1:]}", value)
    if isinstance(value, Mapping):
        return {broken(name, pattern): broken(item, pattern) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [broken(item, pattern) for item in value]
    return value


def opened(row: Row, column: str) -> Any:
    """What the template gets of a column: `tools` may be JSON text, in which escapes hide what it says."""
    value = row.get(column)
    if column != "tools" or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _folded(text: str) -> str:
    """``text`` as templates that change letters or drop blanks could print it."""
    return "".join(text.split()).casefold()


@lru_cache
def _folding_to_ascii() -> frozenset[str]:
    """Blanks, and the letters and signs beyond ASCII that fold to some of it, such as the long s."""
    beyond = map(chr, range(0x80, 0x10000))
    return frozenset(c for c in beyond if c.isspace() or any(part.isascii() for part in c.casefold()))


def _pieces(delimiters: Sequence[str], cut: Any) -> tuple[str, ...]:
    return tuple({cut(each, n) for each in delimiters for n in range(1, len(each))})
