"""Words for people: one way to print on rank 0, to shorten, to count, and to suggest a name."""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Sequence

from halfbyte.terminal.streams import printable

# Names this long may differ in two places from what was written, and names this short in none.
_LONG, _SHORT = 9, 3
_PARTS = 3
_MOST_LINES = 4

CONFIGURATIONS = (".yaml", ".yml")
"""What the name of a configuration ends with."""


def on_rank_0() -> bool:
    """Whether this process is the first of its job, which prints for all; also before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def on_local_rank_0() -> bool:
    """Whether this process is the first on its machine, where ranks know of no others yet."""
    return os.environ.get("LOCAL_RANK", "") in ("", "0")


def say(*lines: str, error: bool = False) -> None:
    """Print ``lines`` on rank 0, to standard error with ``error``.

    A terminal or pipe that is gone never ends the run.
    """
    if on_rank_0() and lines:
        show("\n".join(lines), error=error)


def say_on_this_rank(line: str) -> None:
    """Print ``line`` to standard error from whichever rank this is, after its number where there are several."""
    rank = os.environ.get("RANK")
    show(f"rank {rank}: {line}" if rank else line, error=True)


def show(text: str, *, error: bool = True) -> None:
    """Print ``text`` without secrets and control characters: all that halfbyte prints, and errors, pass here."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says, or its type where it says nothing.

    A line that ends with a colon goes on in the next ones, up to the first that is no item of a list.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    whole = 1
    while lines[whole - 1].endswith((":", ",")) and whole < min(len(lines), _MOST_LINES):
        whole += 1
    return " ".join(lines[: whole if lines[0].endswith(":") else 1])


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name in ``known`` that ``name`` was most likely meant to be, or None."""
    near = _near(name, known, most=1)
    return near[0] if len(near) == 1 else None


def suggestion(name: str, known: Iterable[str], most: int = 1) -> str:
    """``"; did you mean x?"`` with at most ``most`` names, or nothing where no known name is near.

    Up to three names are shown where ``name`` is how all of them begin or end.
    """
    near = _near(name, known, most)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _near(name: str, known: Iterable[str], most: int) -> list[str]:
    """At most ``most`` names in ``known`` that are a slip or two away, else the few that ``name`` begins or ends.

    Names that only share letters are not near: micro_batch_size and auto_find_batch_size, version and verify.
    """
    slips = 2 if len(name) >= _LONG else 1 if len(name) >= _SHORT else 0
    known = list(known)
    alike = [other for other in known if abs(len(other) - len(name)) <= slips]
    found = sorted((edits, other) for other in alike if (edits := _edits(name, other)) <= slips)
    if found:
        return [other for _, other in found[:most]]
    parts = [other for other in known if other.startswith(name) or other.endswith(f"_{name}")]
    return sorted(parts, key=len) if len(name) >= _LONG and len(parts) <= max(most, _PARTS) else []


def _edits(one: str, other: str) -> int:
    """How many characters are to be put in, left out, changed or swapped with the next to make one the other."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, above, row = row, before, [i]
        for j, b in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, above[j - 2] + 1)
            row.append(cost)
    return row[-1]


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


def aligned(rows: Sequence[Sequence[str]], *, left: bool = False) -> list[str]:
    """The lines of a table: first column to the left, the others right, or all ``left``; no blanks at the end."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    other = str.ljust if left else str.rjust
    return ["  ".join([row[0].ljust(widths[0]), *map(other, row[1:], widths[1:])]).rstrip() for row in rows]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads well."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {f"{unit[0]}IB": 1024 ** (power + 1) for power, unit in enumerate(_UNITS)}


def size_in_bytes(text: str) -> int | None:
    """Return the bytes of a size such as ``12GiB`` or ``800MB``; None for any other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or (unit := _UNITS.get(match[2].upper())) is None:
        return None
    return int(float(match[1]) * unit)


def memory(value: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
