"""Words for people: one way to print on rank 0, to shorten, to count, and to suggest a name."""

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable


def say(*lines: str, error: bool = False) -> None:
    """Print ``lines`` on rank 0, to standard error with ``error``.

    A terminal or pipe that is gone never ends the run.
    """
    if os.environ.get("RANK", "0") == "0" and lines:
        _print("\n".join(lines), error)


def say_on_this_rank(line: str) -> None:
    """Print ``line`` to standard error from whichever rank this is, after its number where there are several."""
    rank = os.environ.get("RANK")
    _print(f"rank {rank}: {line}" if rank else line, error=True)


def _print(text: str, error: bool) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says, or its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name in ``known`` that ``name`` was most likely meant to be, or None."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def suggestion(name: str, known: Iterable[str], most: int = 1) -> str:
    """``"; did you mean x?"`` with at most ``most`` names, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=most)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def shorten(text: str, width: int = 60) -> str:
    """``text`` in at most ``width`` printable characters, cut with an ellipsis."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def plural(count: int, noun: str) -> str:
    """``1 row``, ``2,000 rows``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def count(value: float) -> str:
    """A count in three digits: ``950``, ``12.3k``, ``1.20M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def memory(value: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
