"""What the user wrote, before any option is looked up: the command line and the YAML file that it names.

Reading it imports neither torch nor TRL, so what it shows by itself is refused at once.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from halfbyte.config.sources import Entries, Source, read_yaml, shown
from halfbyte.errors import UserError
from halfbyte.terminal.wording import CONFIGURATIONS, shorten

MAX_LINES = 10
Option = tuple[str, list[str], Source]
Mistake = tuple[Source, str | Callable[[], str]]  # nearest names are looked up for the lines that are shown


@dataclass(frozen=True)
class Written:
    """The options of the command line with their words, the keys of the file, and which help is requested.

    ``help`` is ``""`` (none), ``"short"`` or ``"all"``; with help nothing else is read.
    """

    options: list[Option] = field(default_factory=list)
    file: Entries = field(default_factory=Entries)
    help: str = ""


def collect(argv: Sequence[str]) -> Written:
    """Read ``argv`` and the file that its ``--config`` names.

    Raises UserError for a word that belongs to no option, for a second or empty ``--config``, and for a file
    that cannot be read, is not UTF-8 or is not a YAML mapping.
    """
    if help := _help(argv):
        return Written(help=help)
    options = _options(argv)
    files = [words for name, words, _ in options if name == "config"]
    if len(files) > 1:
        raise UserError("given twice; keep one file and give the rest as --key value", option="--config")
    if files and (len(files[0]) != 1 or not files[0][0]):
        raise UserError("takes the path of one YAML file", option="--config")
    file = read_yaml(files[0][0]) if files else Entries()
    return Written([option for option in options if option[0] != "config"], file)


def listed(mistakes: Iterable[Mistake]) -> str:
    """Return one line for each mistake, the file's first in the order of its lines; at most ten lines."""
    ordered = sorted(mistakes, key=lambda mistake: (mistake[0].file is None, mistake[0].line))
    shown = [text if isinstance(text, str) else text() for _, text in ordered[:MAX_LINES]]
    return limited([*shown, *("" for _ in ordered[MAX_LINES:])])


def limited(lines: list[str]) -> str:
    """Join at most ten of ``lines``; the last one counts those that are left out."""
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"... and {len(lines) - MAX_LINES + 1} more"]
    return "\n".join(lines)


def _help(argv: Sequence[str]) -> str:
    for place, word in enumerate(argv):
        if word in ("-h", "--help"):
            return "all" if "all" in argv[place + 1 : place + 2] else "short"
        if word.startswith("--help="):
            if word != "--help=all":
                raise UserError("takes no value but all", option="--help")
            return "all"
    return ""


def _options(argv: Sequence[str]) -> list[Option]:
    """Return the options with their words; ``--key=value`` is ``--key value``, and ``-`` within a name is ``_``."""
    options: list[Option] = []
    closed = True  # a `--key=value` takes no further words
    for word in argv:
        if word.startswith("--") and word != "--":
            name, equals, value = word[2:].partition("=")
            source = Source(option=f"--{shorten(name)}")
            options.append((name.replace("-", "_"), [value] if equals else [], source))
            closed = bool(equals)
        elif closed or (word.startswith("-") and not re.fullmatch(r"-[\d.].*", word)):
            advice = "options are written --key value"
            if word.startswith("-"):
                advice += "; a value that begins with - is written --key=VALUE"
            elif word.endswith(CONFIGURATIONS):
                advice = f"write --config {shlex.quote(word)}"
            raise UserError(f"{shown(word)}: belongs to no option; {advice}")
        else:
            options[-1][1].append(word)
    return options
