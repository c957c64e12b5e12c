"""``halfbyte cache ls|rm``: what is kept on disk for later runs, and how to remove it."""

import json
import time
from pathlib import Path

from halfbyte import store
from halfbyte.commands.parser import Parser
from halfbyte.errors import UserError
from halfbyte.terminal.wording import first_line, memory, plural, say, suggestion

_COMMAND = "halfbyte cache"


def main(arguments: list[str]) -> int:
    """Run one cache command; raises :class:`UserError` for an unknown key, or one in use."""
    parser = Parser("cache")
    parser.add_argument("action", choices=("ls", "rm"), help="list the entries, or remove some")
    parser.add_argument("keys", nargs="*", metavar="KEY", help="rm: what to remove")
    parser.add_argument("--all", action="store_true", help="rm: remove every entry")
    parser.add_argument("--json", action="store_true", help="ls: print a JSON list")
    options = parser.parse(arguments)
    if options.action == "ls" and (options.keys or options.all):
        parser.error("ls takes no KEY and no --all")
    if options.action == "rm" and (options.json or bool(options.keys) == options.all):
        parser.error("rm takes KEY... or --all")
    try:
        directory = store.cache_directory()
    except OSError as error:
        raise UserError(first_line(error), option=_COMMAND) from error
    entries = store.entries()
    if options.action == "ls":
        _list(entries, directory, as_json=options.json)
    else:
        _remove(entries if options.all else _named(options.keys, entries, directory))
    return 0


def _list(entries: list[store.Entry], directory: Path, *, as_json: bool) -> None:
    if as_json:
        say(json.dumps([vars(entry) for entry in entries], indent=2))
        return
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        states = ("damaged" if entry.damaged else "", "in use" if entry.in_use else "")
        columns = (entry.key, entry.kind, f"{memory(entry.size):>10}", used, entry.base)
        say("  ".join((*columns, ", ".join(filter(None, states)))).rstrip())
    total = sum(entry.size for entry in entries)
    kinds = " and ".join(
        plural(sum(entry.kind == kind.name for entry in entries), kind.noun) for kind in store.KINDS
    )
    say(f"{kinds}, {total / 2**30:.2f} of {store.BOUND / 2**30:.0f} GiB, in {directory}")


def _named(keys: list[str], entries: list[store.Entry], directory: Path) -> list[store.Entry]:
    known = {entry.key for entry in entries}
    for key in keys:
        if key not in known:
            raise UserError(
                f"nothing is stored as {key!r} in {directory}{suggestion(key, known)}; "
                f"`halfbyte cache ls` shows the keys",
                option=_COMMAND,
            )
    return [entry for entry in entries if entry.key in keys]


def _remove(entries: list[store.Entry]) -> None:
    in_use, problems = [], []
    for entry in entries:
        try:
            if store.remove(entry.kind, entry.key):
                say(f"removed {entry.key} ({entry.base or 'damaged'})")
            else:
                in_use.append(entry.key)
        except OSError as error:
            problems.append(f"cannot remove {entry.key}: {error.strerror}")
    if in_use:
        problems.append(f"in use by a running process, and not removed: {', '.join(in_use)}")
    if problems:
        raise UserError("\n".join(problems), option=_COMMAND)
