"""Progress on the terminal: lines, and on a TTY a bar under them."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from halfbyte.terminal.streams import printable
from halfbyte.terminal.wording import count, say
from halfbyte.tracking.figures import DEFAULT, Figures, are_ties
from halfbyte.tracking.metrics import is_evaluation
from halfbyte.tracking.rows import Row

_BAR = 18  # columns
# What stands before the figures: description, bar, counter, time left, and the spaces between them.
_COUNTED = len("train") + _BAR + len("100:00:00") + 4
_SPEED = 86_400.0  # seconds over which the time of a step is taken: in rich's own 30 a long step is never seen to end
_SLOW_EVALUATION = 2.0  # seconds, after which an evaluation gets a bar of its own


class RunProgress:
    """What rank 0 shows while it trains: with ``bar``, and on a terminal, a bar; else lines."""

    def __init__(self, bar: bool, figures: Figures = DEFAULT) -> None:
        self._figures = figures
        self._live: Progress | None = None
        self._wants_bar = bar and sys.stdout.isatty()
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._evaluation_start: float | None = None
        self._evaluated = 0  # batches
        self._total = 0  # steps

    def begin(self, step: int, total: int) -> None:
        self._total = total
        if self._wants_bar and self._live is None:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=_BAR),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
                console=Console(),
                speed_estimate_period=_SPEED,
            )
            self._training = self._live.add_task("train", total=total, completed=step, figures="")
            self._live.start()

    def step(self, step: int) -> None:
        if self._live is not None and self._training is not None:
            self._live.update(self._training, completed=step)

    def row(self, row: Row, tokens_per_second: float | None) -> None:
        """Print one row of ``metrics.jsonl``; show as many of its figures in the bar as there is room for."""
        parts = _parts(row, tokens_per_second, self._figures)
        if not parts or "train_runtime" in row:  # the closing row belongs to the summary
            return
        evaluation = is_evaluation(row)
        text = "  ".join(["eval", *parts] if evaluation else parts)
        self._print(f"step {row['step']}/{self._total}  {text}")
        if self._live is not None and self._training is not None and not evaluation:
            room = self._live.console.width - _COUNTED - 2 * len(str(self._total)) - 1
            self._live.update(self._training, figures=_fitting(parts, room))

    def lines(self, lines: Sequence[str]) -> None:
        """Print lines above the bar."""
        for line in lines:
            self._print(line)

    def evaluating(self, batches: int | None) -> None:
        """Count one batch of an evaluation; show a bar once it proves slow."""
        now = time.perf_counter()
        if self._evaluation_start is None:
            self._evaluation_start, self._evaluated = now, 0
        self._evaluated += 1
        if self._live is None or now - self._evaluation_start < _SLOW_EVALUATION:
            return
        if self._evaluation is None:
            self._evaluation = self._live.add_task("eval", total=batches, figures="")
        self._live.update(self._evaluation, completed=self._evaluated)

    def evaluated(self) -> None:
        if self._live is not None and self._evaluation is not None:
            self._live.remove_task(self._evaluation)
        self._evaluation = self._evaluation_start = None

    def end(self) -> None:
        """Remove the bar, if there is one."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
        else:
            say(line)


def figures(
    row: Mapping[str, Any], tokens_per_second: float | None = None, *, shown: Figures = DEFAULT
) -> str:
    """The figures of a row on one line: ``loss 1.234  lr 2.0e-04  grad 0.81  12.3k tok/s``."""
    return "  ".join(_parts(row, tokens_per_second, shown))


def _parts(row: Mapping[str, Any], tokens_per_second: float | None, shown: Figures) -> list[str]:
    prefix = "eval_" if is_evaluation(row) else ""
    parts = []
    for figure in shown.logged:
        value = row.get(prefix + figure.key)
        if are_ties(row, prefix + figure.key):
            parts.append(f"{figure.label} - (ties)")
        elif isinstance(value, int | float):
            parts.append(f"{figure.label} {value:{figure.form}}")
        elif prefix + figure.key in row:
            parts.append(f"{figure.label} nan")  # null in the file: it was not finite
    if prefix:  # one of several data sets: eval_NAME_loss
        own = {"eval_loss", *(prefix + figure.key for figure in shown.logged)}
        names = [key for key in row if key.startswith(prefix) and key.endswith("_loss") and key not in own]
        parts += [f"{key[len(prefix) : -len('_loss')]} loss {row[key]:.4g}" for key in names if row[key]]
    if tokens_per_second is not None:
        parts.append(f"{count(tokens_per_second)} tok/s")
    if isinstance(row.get("mfu"), float):
        parts.append(f"mfu {row['mfu']:.1%}")
    return parts


def _fitting(parts: list[str], room: int) -> str:
    """The first of ``parts`` that fit into ``room`` columns."""
    while parts and len("  ".join(parts)) > room:
        parts = parts[:-1]
    return "  ".join(parts)
