"""Runs on the terminal: a table as wide as there is room for, which run is better, and what differs."""

import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfbyte.terminal.streams import printable
from halfbyte.terminal.wording import aligned, plural, say
from halfbyte.tracking.columns import Column, columns, evaluated, headline, is_less_better
from halfbyte.tracking.comparison import Differences, differences, verdicts
from halfbyte.tracking.runs import Run

_GAP = 2  # columns between two of the table
_SHARED = ("status", "recipe", "base", "data")  # named once where all runs have the same
_STOPPED = ("interrupted", "failed")
_STYLES = {"completed": "green", "failed": "red", "interrupted": "yellow", "running": "cyan"}


def show(runs: Sequence[Run], order: str | None = None) -> None:
    """Print ``runs``: on a terminal a table cut to its width, else every column in plain lines."""
    found = columns(runs)
    if sys.stdout.isatty():
        _show_table(runs, found)
    else:
        rows = [[column.name for column in found], *zip(*(column.cells for column in found), strict=True)]
        say(*aligned(rows))
    if order is not None:
        say(order)
    say(*(line for run in runs for line in _notes(run, alone=len(runs) == 1)))
    if len(runs) > 1:
        if lines := verdicts(runs):
            say("", "which is better", *(_wrapped(f"  {line}") for line in lines))
        _show_differences(runs, differences(runs))


def _notes(run: Run, *, alone: bool) -> list[str]:
    """What the table cannot say of a run; of one that stopped, or is ``alone``, the command to go on with."""
    notes = []
    if best := run.record.get("best_checkpoint"):
        notes.append(f"{run.name}: its weights are those of {best}, the best")
    if run.abandoned:
        notes.append(
            f"{run.name}: run.json says running, and no process of this machine holds it: killed, or elsewhere"
        )
    command = run.record.get("next")
    if isinstance(command, str) and (alone or run.abandoned or run.record["status"] in _STOPPED):
        notes.append(f"{run.name}: next: {command}")
    return notes


def as_json(runs: Sequence[Run]) -> str:
    """Everything, one object a run: what run.json holds, with name, directory, steps planned, and figures."""
    kept = [(figure, part) for figure, part in headline(runs)]
    return json.dumps([_object(run, kept, runs) for run in runs], indent=2, ensure_ascii=False)


def _object(run: Run, kept: Sequence[tuple[Any, str]], runs: Sequence[Run]) -> dict[str, Any]:
    found = {}
    for figure, part in kept:
        less = is_less_better(figure.key, runs)
        if (each := evaluated(run, figure, part, less=less)) is not None:
            name = figure.key if part == "train" else f"{part.replace(' ', '_')}_{figure.key}"
            found[name] = {**vars(each), "greater_is_better": not less}
    return {
        "name": run.name,
        "directory": str(run.directory),
        **run.record,
        "steps": run.steps,
        "total_steps": run.total_steps,
        "abandoned": run.abandoned,
        "best": found,
    }


def _show_table(runs: Sequence[Run], found: Sequence[Column]) -> None:
    console = Console()
    shared = [c for c in found if len(runs) > 1 and c.name in _SHARED and len(set(c.cells)) == 1]
    shown, dropped = _fitting([c for c in found if c not in shared], console.width)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for column in shown:
        fold = column.name == "name"
        table.add_column(
            Text(_header(column), justify="right" if column.number else "left"),
            justify="right" if column.number else "left",
            overflow="fold" if fold else "ellipsis",
            no_wrap=not fold,
            max_width=_name_width(console.width) if fold else None,
        )
    for row in range(len(runs)):
        table.add_row(*(_cell(column, row) for column in shown))
    console.print(table)
    if shared:
        say(_wrapped(f"all: {', '.join(column.cells[0] for column in shared if column.cells[0] != '-')}"))
    if dropped:
        names = ", ".join(column.name.replace("_", " ") for column in dropped)
        say(_wrapped(f"no room in {console.width} columns: {names} (--json has them)"))


def _cell(column: Column, row: int) -> Text:
    # Before the table folds it: a secret in two lines is not recognized.
    text = printable(column.cells[row])
    if column.name == "status":
        return Text(text, style=_STYLES.get(text, ""))
    return Text(text)


def _header(column: Column) -> str:
    """The name in lines of about equal length: a figure's is wider than its values."""
    words = column.name.replace("_", " ").split(" ")
    return "\n".join([words[0], " ".join(words[1:])]) if len(words) > 1 else words[0]


def _fitting(found: Sequence[Column], width: int) -> tuple[list[Column], list[Column]]:
    """Those of ``found`` that fit into ``width``, and those that do not: the less important come last."""
    shown, dropped, left = [], [], width
    for column in found:
        lines = [*_header(column).splitlines(), *map(printable, column.cells)]
        needed = max(map(len, lines))
        needed = min(needed, _name_width(width)) if column.name == "name" else needed
        if needed <= left:
            shown.append(column)
            left -= needed + _GAP
        else:
            dropped.append(column)
    return shown, dropped


def _name_width(width: int) -> int:
    return max(16, 2 * width // 5)


def _wrapped(line: str) -> str:
    """``line`` in the lines of the terminal, broken between words; off a terminal as it is."""
    if not sys.stdout.isatty():
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(printable(line), Console().width, subsequent_indent=indent, break_on_hyphens=False)


def _show_differences(runs: Sequence[Run], found: Differences) -> None:
    if not found.values and not found.not_shared:
        say("", "nothing differs between the configurations")
        return
    say("", "what differs")
    rows = [["", *(run.name for run in runs)], *([key, *values] for key, values in found.values.items())]
    lines = aligned([list(map(printable, row)) for row in rows], left=True)
    width = Console().width if sys.stdout.isatty() else None
    if not found.values:
        pass
    elif width is None or max(map(len, lines)) + 2 <= width:
        say(*(f"  {line}" for line in lines))
    else:
        _say_by_value(runs, found)
    if found.not_shared:
        say(f"  and {plural(found.not_shared, 'option')} that not all of the runs have")


def _say_by_value(runs: Sequence[Run], found: Differences) -> None:
    """Each value with the runs that have it, for what is too wide to stand side by side."""
    for key, values in found.values.items():
        having: dict[str, list[str]] = defaultdict(list)
        for run, value in zip(runs, values, strict=True):
            having[value].append(run.name)
        say(f"  {key}", *(_wrapped(f"    {value}: {', '.join(names)}") for value, names in having.items()))
