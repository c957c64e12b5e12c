"""What a file of rows cannot hold, found before a parser stumbles or crashes on it, or named after one has failed."""

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from halfbyte.errors import UserError
from halfbyte.terminal.wording import shorten

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
DEEPEST = 64  # levels that Arrow stores
# How a file begins, and ends: Arrow's stream may end without a mark.
_MARKS = {".parquet": ((b"PAR1",), b"PAR1"), ".arrow": ((b"ARROW1", b"\xff\xff\xff\xff"), b"")}
_TEXT = (".json", ".jsonl", ".csv", ".txt")
_BLOCK = 1 << 20
_WHOLE = 1 << 30  # bytes of an array that are parsed again to find the place of a mistake
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Strings, so that brackets in them do not count, and all that is no bracket.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


def refuse(path: Path) -> None:
    """Raise UserError for a file that is not readable text of rows, with the line or byte at fault."""
    if not path.is_file():
        raise UserError(f"{path} is a pipe, a device or a link to nothing; write the rows to a file")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        if path.suffix in _TEXT:
            _refuse_bytes(path)
        if path.suffix in (".json", ".jsonl"):
            _refuse_lines(path)
        if path.suffix in _MARKS:
            _refuse_unmarked(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _refuse_bytes(path: Path) -> None:
    decoder, place, lines = codecs.getincrementaldecoder("utf-8")(), 0, 1
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if place == 0 and block.startswith(_UTF16):
                raise UserError(f"{path} is UTF-16; {_convert(path, 'UTF-16')}")
            if (nul := block.find(b"\0")) >= 0:
                line = lines + block.count(b"\n", 0, nul)
                raise UserError(
                    f"{path}: line {line}, byte {place + nul + 1} of the file, is NUL, which no text holds; it may be "
                    "UTF-16, or cut off by a full disk"
                )
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                at = error.start - pending
                line = lines + block.count(b"\n", 0, max(0, at))
                raise UserError(
                    f"{path}: line {line}, byte {place + at + 1} of the file, is not UTF-8; {_convert(path, 'latin1')}"
                ) from error
            place, lines = place + len(block), lines + block.count(b"\n")
    if decoder.getstate()[0]:
        raise UserError(f"{path}: line {lines}, the end of the file, is not UTF-8; the file may be cut off")


def _refuse_unmarked(path: Path) -> None:
    """Refuse a file without its format's marks, whatever its size: before all of it is read to identify it."""
    starts, end = _MARKS[path.suffix]
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(-min(8, path.stat().st_size), 2)
        last = file.read()
    if not start.startswith(starts) or not last.endswith(end):
        raise UserError(f"{path}: not a whole {path.suffix[1:]} file; write or download it again")


def _refuse_lines(path: Path) -> None:
    """Refuse what Arrow's parser crashes on: deep nesting, and a first row that is `null` (apache/arrow#47409)."""
    depth = 0
    with path.open("rb") as file:
        head = file.read(_BLOCK).removeprefix(codecs.BOM_UTF8)
        if (null := re.match(rb"\s*\[?\s*null\b", head)) is not None:
            raise _null_row(path, null[0].count(b"\n") + 1)
        file.seek(0)
        for number, line in enumerate(file, 1):
            row = line.strip()
            if depth == 0 and row == b"null":
                raise _null_row(path, number)
            opened = row.count(b"[") + row.count(b"{")
            if depth + opened <= DEEPEST and row[:1] + row[-1:] in (b"{}", b""):
                continue  # one row in one line
            deepest, depth = _depths(row, depth)
            if deepest > DEEPEST:
                raise UserError(
                    f"{path}: line {number} is nested more than {DEEPEST} levels deep; leave it out"
                )


def _null_row(path: Path, line: int) -> UserError:
    return UserError(f"{path}: line {line} is `null`, which is no row; remove it")


def _depths(row: bytes, depth: int) -> tuple[int, int]:
    """The deepest level of a line that begins at ``depth``, and the level at its end."""
    signs = np.frombuffer(_STRING.sub(b"", row).translate(None, _NO_BRACKETS), dtype=np.uint8)
    levels = depth + np.cumsum(np.where((signs == ord("[")) | (signs == ord("{")), 1, -1))
    return (int(levels.max()), max(0, int(levels[-1]))) if len(levels) else (depth, depth)


def _convert(path: Path, encoding: str) -> str:
    return f"convert it, if it is {encoding}: iconv -f {encoding} -t UTF-8 {shorten(path.name)!r}"


def fault(path: Path) -> str | None:
    """Where a file stops being JSON rows, and why, or None: read again once a parser has failed on it."""
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return None
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        start = file.read(64).split()[:2]
        if (start[:1] == ["{"] or (start and start[0][0] == "[")) and path.stat().st_size <= _WHOLE:
            file.seek(0)  # one value over several lines
            return _mistake(file.read(), 1)
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip() and (found := _mistake(line.rstrip(), number)) is not None:
                return found
    return None


def _mistake(text: str, first: int) -> str | None:
    try:
        value: Any = json.loads(text)
    except RecursionError:
        return None
    except json.JSONDecodeError as error:
        where = f"line {first + error.lineno - 1}, column {error.colno}"
        if text[error.pos :].strip() == "," or text[: error.pos].rstrip().endswith(","):
            return f"{where}: a comma too many"
        if text[error.pos : error.pos + 1] == "'":
            return f"{where}: JSON is written with double quotes"
        return f"{where}: {error.msg}"
    rows = value if isinstance(value, list) and first == 1 and text.lstrip()[:1] == "[" else [value]
    odd = next((row for row in rows if not isinstance(row, dict)), None)
    return None if odd is None else f"line {first}: a row must be an object, {{...}}"


def files_at(name: str) -> list[Path]:
    """The data files that a local name stands for; none for a name that is not local."""
    path = Path(name).expanduser()
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return sorted(path.rglob("*.arrow"))
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in BUILDERS)
    return [path] if path.is_file() else []


@contextlib.contextmanager
def reading(*names: str) -> Iterator[None]:
    """Turn whatever `datasets` raises while it reads ``names`` into a UserError with the first cause and its place."""
    shown = ", ".join(names)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        files = [file for name in names for file in files_at(name)]
        if datasets.config.HF_HUB_OFFLINE and isinstance(error, OSError) and not files:
            raise UserError(
                f"{shown}: not a local path, not in the cache, and HF_HUB_OFFLINE is set\n"
                "  unset HF_HUB_OFFLINE, or give a local path"
            ) from error
        if "corresponds to no data" in str(error):  # a plain ValueError, which has no other mark
            raise UserError(f"{shown}: the split has no rows") from error
        for file in files:
            if (found := fault(file)) is not None:
                raise UserError(f"{file}: cannot be read: {found}") from error
        # "An error occurred while generating the dataset" gives no reason; its cause does.
        generic = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if generic and error.__cause__ is not None else error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        raise UserError(
            f"{shown}: cannot be read: " + "\n  ".join(line[:200] for line in lines[:3])
        ) from error
