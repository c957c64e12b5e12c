"""Passes over many rows, with how far they are: a bar on a terminal, plain lines elsewhere, nothing for short ones."""

import contextlib
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

from halfbyte.terminal.wording import count, on_rank_0, say

QUIET = 2.0  # seconds before a pass is shown
APART = 10.0  # seconds between two lines of a pass, and a tenth of its time more


class _Display:
    """How the passes of a block are shown, and their bars."""

    def __init__(self, by: str) -> None:
        self.by = by
        self.bars: list[Any] = []


_SHOWN: ContextVar[_Display | None] = ContextVar("shown", default=None)


@contextlib.contextmanager
def shown(bar: bool) -> Iterator[None]:
    """Show the passes of the block on rank 0: with ``bar``, and on a terminal, by a bar; else by lines."""
    display = None
    if on_rank_0():
        display = _Display("bar" if bar and sys.stdout.isatty() else "lines")
    before = _SHOWN.set(display)
    try:
        yield
    finally:
        _SHOWN.reset(before)
        for each in display.bars if display is not None else ():  # of passes that an error cut off
            each.stop()


class Pass:
    """One pass over ``total`` rows, or over an unknown number of them, in a ``with`` block of its own.

    A long one prints a line at its end, unless it is not ``summed_up``: its caller prints what came of it.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        done: int = 0,
        unit: str = "rows",
        summed_up: bool = True,
    ) -> None:
        self._label, self._total, self._unit, self._summed_up = label, total, unit, summed_up
        self._done = self._begun_at = done
        self._display: _Display | None = None
        self._bar: Any = None
        self._task: Any = None
        self._begun = self._next = 0.0

    def __enter__(self) -> Self:
        self._display = _SHOWN.get()
        self._begun = time.monotonic()
        self._next = self._begun + QUIET
        return self

    def advance(self, rows: int) -> None:
        """Count ``rows`` more, and show them once the pass proves long."""
        self._done += rows
        if self._display is None or (now := time.monotonic()) < self._next:
            return
        seconds = now - self._begun
        if self._display.by == "lines":
            self._next = now + max(APART, seconds / 10)
            say(f"{self._label}: {self._counted()}, {self._rate(seconds)}{self._left(seconds)}")
            return
        self._next = now + 0.1
        if self._bar is None:
            self._bar, self._task = _bar(self._label, self._total)
            self._display.bars.append(self._bar)
        self._bar.update(self._task, completed=self._done, rate=self._rate(seconds))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        seconds = time.monotonic() - self._begun
        if self._summed_up and kind is None and self._display is not None and seconds >= QUIET:
            say(f"{self._label}: {self._done:,} {self._unit} in {_span(seconds)}, {self._rate(seconds)}")

    def _counted(self) -> str:
        of = "" if self._total is None else f" of {self._total:,}"
        return f"{self._done:,}{of} {self._unit}"

    def _rate(self, seconds: float) -> str:
        return f"{count((self._done - self._begun_at) / seconds)} {self._unit}/s"

    def _left(self, seconds: float) -> str:
        made = self._done - self._begun_at
        if self._total is None or not made:
            return ""
        return f", {_span((self._total - self._done) * seconds / made)} left"


def _bar(label: str, total: int | None) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        console=Console(),
        transient=True,
    )
    task = bar.add_task(label, total=total, rate="")
    bar.start()
    return bar, task


def _span(seconds: float) -> str:
    """``37 s``, ``12 min``, ``3.4 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
