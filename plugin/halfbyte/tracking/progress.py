"""Progress on the terminal: a bar on a TTY, plain lines elsewhere, and the closing summary."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from halfbyte.tracking.metrics import Row, is_evaluation

# TRL's name, ours, and how the value is written.
_FIGURES = (
    ("loss", "loss", ".4g"),
    ("learning_rate", "lr", ".1e"),
    ("grad_norm", "grad", ".2g"),
    ("mean_token_accuracy", "token accuracy", ".3f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    ("rewards/margins", "margin", ".3g"),
    ("reward", "reward", ".3g"),
)
_SLOW_EVALUATION = 2.0  # seconds, after which an evaluation gets a bar of its own


class RunProgress:
    """What rank 0 shows while it trains.

    Args:
        bar: whether a bar is wanted; there is none unless standard output is a terminal.
    """

    def __init__(self, bar: bool) -> None:
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
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(),
            )
            self._training = self._live.add_task("train", total=total, completed=step, figures="")
            self._live.start()

    def step(self, step: int) -> None:
        if self._live is not None and self._training is not None:
            self._live.update(self._training, completed=step)

    def row(self, row: Row, tokens_per_second: float | None) -> None:
        """Shows one row of ``metrics.jsonl``: in the bar, or as a line."""
        text = figures(row, tokens_per_second)
        if not text or "train_runtime" in row:  # the closing row belongs to the summary
            return
        if is_evaluation(row):
            self._print(f"step {row['step']}/{self._total}  eval  {text}")
        elif self._live is not None and self._training is not None:
            self._live.update(self._training, figures=text)
        else:
            self._print(f"step {row['step']}/{self._total}  {text}")

    def evaluating(self, batches: int | None) -> None:
        """Counts one batch of an evaluation; shows a bar once it proves slow."""
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
        """Takes the bar down; harmless when there is none."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


def figures(row: Mapping[str, Any], tokens_per_second: float | None = None) -> str:
    """The figures of a row on one line: ``loss 1.234  lr 2.0e-04  grad 0.81  12.3k tok/s``."""
    prefix = "eval_" if is_evaluation(row) else ""
    parts = []
    for key, name, form in _FIGURES:
        if key == "mean_token_accuracy" and f"{prefix}rewards/accuracies" in row:
            continue  # of preference pairs, the pairs' accuracy is the one that matters
        value = row.get(prefix + key)
        if isinstance(value, int | float):
            parts.append(f"{name} {value:{form}}")
        elif prefix + key in row:
            parts.append(f"{name} nan")  # null in the file: it was not finite
    if prefix:  # one of several data sets: eval_NAME_loss
        names = [
            key for key in row if key.startswith(prefix) and key.endswith("_loss") and key != "eval_loss"
        ]
        parts += [f"{key[len(prefix) : -len('_loss')]} loss {row[key]:.4g}" for key in names if row[key]]
    if tokens_per_second is not None:
        parts.append(f"{count(tokens_per_second)} tok/s")
    return "  ".join(parts)


def count(value: float) -> str:
    """A count in three digits: ``950``, ``12.3k``, ``1.20M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def memory(value: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def print_summary(rows: Sequence[tuple[str, str]], commands: Sequence[tuple[str, str]]) -> None:
    """Prints the closing summary.

    Args:
        rows: label and value.
        commands: label and a line to copy, which is printed whole, never wrapped or cut.
    """
    console = Console()
    if sys.stdout.isatty():
        table = Table(show_header=False, box=None, pad_edge=False)
        for label, value in rows:
            table.add_row(Text(label, style="bold"), Text(value, overflow="fold"))
        console.print()
        console.print(table)
    else:
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            print(f"{label:<{width}}  {value}")
    for label, command in commands:
        print(f"{label}: {command}", flush=True)
