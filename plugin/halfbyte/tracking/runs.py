"""Runs on disk as values: found below directories, read from run.json and metrics.jsonl, and named."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.history import EARLIER, METRICS, step_of
from halfbyte.checkpoint.place import lock_beside
from halfbyte.errors import UserError
from halfbyte.files import LONGEST_TEXT, read
from halfbyte.locks import is_in_use
from halfbyte.terminal.wording import first_line, shorten
from halfbyte.tracking.figures import DEFAULT, Figures
from halfbyte.tracking.record import plain
from halfbyte.tracking.rows import Row, read_rows
from halfbyte.tracking.series import Points, curves, is_number

DEPTH = 4
"""How many folders below a directory its runs are looked for."""
_RECORD = "run.json"
_SHOWN = 6  # folders without a run that are named
_INSIDE = ("plots", "wandb", EARLIER)  # of a run; none of its own runs are there


@dataclass(frozen=True)
class Run:
    """One run: its directory, the name that tells it from those beside it, run.json, and the rows of metrics.jsonl."""

    directory: Path
    name: str
    record: Mapping[str, Any]
    rows: list[Row] = field(repr=False)

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration."""
        found: Mapping[str, Any] = self.record["config"]
        return found

    @cached_property
    def figures(self) -> Figures:
        """The figures of its recipe as run.json keeps them; the usual ones for a run that kept none."""
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            return Figures.from_dict(self.record["figures"])
        return DEFAULT

    @cached_property
    def status(self) -> str:
        """The status in run.json, with a question mark for a run that nothing holds: see :attr:`abandoned`."""
        return f"{self.record['status']}?" if self.abandoned else str(self.record["status"])

    @cached_property
    def abandoned(self) -> bool:
        """Whether run.json says running, and no process of this machine holds the directory."""
        if self.record["status"] != "running":
            return False
        return not (is_in_use(lock_beside(self.directory)) or is_in_use(self.directory))

    @property
    def steps(self) -> int:
        """The steps that were taken; of a run at work those that are logged, for run.json is written at saves."""
        logged = [row["step"] for row in self.rows[-1:] if self.record["status"] == "running"]
        return max(int(self.record["steps"]), *logged, 0)

    @property
    def total_steps(self) -> int | None:
        """The steps that were planned."""
        planned = (self.record.get("total_steps"), self.config.get("max_steps"))
        return next((steps for steps in planned if isinstance(steps, int) and steps > 0), None)

    @property
    def tokens_per_second(self) -> float | None:
        found = self.record.get("tokens_per_second")
        return float(found) if is_number(found) else None

    @property
    def peak_memory(self) -> int | None:
        """The peak memory in bytes of the rank that held most."""
        peaks = self.record.get("peak_memory_bytes")
        known = [int(each) for each in peaks if is_number(each)] if isinstance(peaks, list) else []
        return max(known, default=None)

    @property
    def base(self) -> str | None:
        """The base as it was named."""
        found = self.part("base").get("name") or self.config.get("model_name_or_path")
        return str(found) if found else None

    @property
    def data(self) -> list[str]:
        """The data sets as they were named."""
        mixture = self.config.get("datasets")
        entries = mixture if isinstance(mixture, list) else []
        paths = [each.get("path") for each in entries if isinstance(each, Mapping)]
        return [str(name) for name in (self.config.get("dataset_name"), *paths) if name]

    def part(self, key: str) -> Mapping[str, Any]:
        """The mapping under ``key`` of run.json; an empty one where there is none."""
        found = self.record.get(key)
        return found if isinstance(found, Mapping) else {}

    def parts(self, key: str) -> dict[str, Points]:
        """The points of the figure ``key`` by part: ``train``, ``eval``, or ``eval NAME`` of several data sets."""
        if key not in self._parts:
            self._parts[key] = {part: points for (_, part), points in curves(self.rows, [key]).items()}
        return self._parts[key]

    @cached_property
    def _parts(self) -> dict[str, dict[str, Points]]:
        return {}

    def ended_undefined(self, key: str, part: str) -> bool:
        """Whether the last value of a figure was no finite number, which the log has as null."""
        name = key if part == "train" else f"{part.replace(' ', '_')}_{key}"
        logged = [row[name] for row in reversed(self.rows) if name in row][:1]
        return logged == [None]


@dataclass(frozen=True)
class Found:
    """The runs that were found, by name, and a line for each directory or file that is left out."""

    runs: list[Run]
    left_out: list[str]


def find(directories: Sequence[Path]) -> Found:
    """Read the runs that ``directories`` are, or that are at most :data:`DEPTH` folders below them.

    Raises :class:`UserError` where there is none.
    """
    read_in: dict[Path, tuple[Mapping[str, Any], list[Row]]] = {}
    left_out: list[str] = []
    for directory in directories:
        foreign = True
        for place, problem in _look(directory, DEPTH):
            foreign = False
            if problem is None:
                try:
                    read_in.setdefault(Path(os.path.realpath(place)), _read(place, left_out))
                except ValueError as error:
                    problem = str(error)
            if problem is not None:
                left_out.append(f"{place}: {problem}")
        if foreign:
            left_out.append(f"{directory}: no run: there is no {_RECORD} down to {DEPTH} folders below")
    if not read_in:
        raise UserError("\n".join(["no run was found", *(f"  {line}" for line in left_out[:8])]))
    named = _named(list(read_in))
    runs = [Run(place, named[place], *found) for place, found in read_in.items()]
    return Found(sorted(runs, key=lambda run: _natural(run.name)), list(dict.fromkeys(left_out)))


def _look(directory: Path, depth: int) -> Iterator[tuple[Path, str | None]]:
    """The runs at and below ``directory``, each with None; with what cannot be read or is no run beside one, why."""
    try:
        inside = sorted(os.scandir(directory), key=lambda entry: entry.name)
        here = (directory / _RECORD).exists() or (directory / METRICS).exists()
    except (OSError, ValueError) as error:
        yield directory, f"cannot be read: {getattr(error, 'strerror', None) or first_line(error)}"
        return
    if here:
        yield directory, None
    folders = [
        directory / each.name
        for each in inside
        if depth and each.is_dir(follow_symlinks=False) and not each.name.startswith(".")
    ]
    below = {
        folder: list(_look(folder, depth - 1))
        for folder in folders
        if not (here and (folder.name in _INSIDE or step_of(folder) is not None))
    }
    for found in below.values():
        yield from found
    # Beside runs it may be taken for one; inside a run it is one of its files, and above no run all are foreign.
    foreign = [folder.name for folder, found in below.items() if not found]
    if foreign and not here and any(below.values()):
        yield directory, f"no {_RECORD} in {_some(foreign)}"


def _some(found: list[str]) -> str:
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{', '.join(map(shorten, found[:_SHOWN]))}{more}"


def _read(place: Path, left_out: list[str]) -> tuple[Mapping[str, Any], list[Row]]:
    """run.json and rows of the run in ``place``; raises ValueError for no run.json of ours.

    A log that cannot be read is one of ``left_out``.
    """
    try:
        record = json.loads(read(place / _RECORD, LONGEST_TEXT))
    except FileNotFoundError:
        raise ValueError(f"no run: it has no {_RECORD}") from None
    except OSError as error:
        raise ValueError(f"{_RECORD} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{_RECORD} is damaged") from None
    kinds = {"status": str, "recipe": str, "steps": int, "config": dict}
    if not isinstance(record, dict) or any(
        not isinstance(record.get(key), kind) for key, kind in kinds.items()
    ):
        raise ValueError(f"{_RECORD} is damaged, or not one of halfbyte's")
    try:
        rows = read_rows(place / METRICS)
    except OSError as error:
        left_out.append(f"{place / METRICS}: cannot be read: {error.strerror}")
        rows = []
    return plain(record), [each for row in rows if isinstance((each := _numbers(row)).get("step"), int)]


def _numbers(row: Row) -> Row:
    """What of a row is a number, and as None what is not finite: whatever else stands there is not ours."""
    return {
        key: value if is_number(value) else None
        for key, value in row.items()
        if value is None or isinstance(value, float) or is_number(value)
    }


def _named(places: list[Path]) -> dict[Path, str]:
    """The shortest paths that tell ``places`` apart: those below the folder that all are in."""
    common = os.path.commonpath([place.parent for place in places])
    return {place: os.path.relpath(place, common) for place in places}


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts run-2 before run-10."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
