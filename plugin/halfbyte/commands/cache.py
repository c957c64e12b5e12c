"""``halfbyte cache ls|rm``: what is kept on disk for later runs, and how to remove it."""

import json
import time

from halfbyte import store
from halfbyte.commands.parser import Parser
from halfbyte.errors import UserError
from halfbyte.wording import plural

_COMMAND = "halfbyte cache"


def main(arguments: list[str]) -> int:
    """Run one cache command; raises :class:`UserError` for an unknown key, or one in use."""
    parser = Parser("cache")
    parser.add_argument("action", choices=("ls", "rm"), help="list the entries, or remove some")
    parser.add_argument("keys", nargs="*", metavar="KEY", help="rm: what to remove")
    parser.add_argument("--all", action="store_true", help="rm: remove every entry")
    parser.add_argument("--json", action="store_true", help="ls: print a JSON list")
    options = parser.parse(arguments)
    if options.action == "ls":
        if options.keys or options.all:
            parser.error("ls takes no KEY and no --all")
        _list(as_json=options.json)
    else:
        if options.json or bool(options.keys) == options.all:
            parser.error("rm takes KEY... or --all")
        _remove([entry.key for entry in store.entries()] if options.all else options.keys)
    return 0


def _list(*, as_json: bool) -> None:
    entries = store.entries()
    if as_json:
        print(json.dumps([vars(entry) for entry in entries], indent=2))
        return
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        state = "damaged" if entry.damaged else "in use" if entry.in_use else ""
        size = f"{entry.size / 2**30:8.2f} GiB"
        print(f"{entry.key}  {entry.kind}  {size}  {used}  {entry.base}  {state}".rstrip())
    total = sum(entry.size for entry in entries)
    kinds = " and ".join(
        plural(sum(entry.kind == kind.name for entry in entries), kind.noun) for kind in store.KINDS
    )
    print(f"{kinds}, {total / 2**30:.2f} of {store.BOUND / 2**30:.0f} GiB, in {store.cache_directory()}")


def _remove(keys: list[str]) -> None:
    known = {entry.key: entry for entry in store.entries()}
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise UserError(
            f"nothing is stored as {unknown[0]!r} in {store.cache_directory()}; `halfbyte cache ls` shows the keys",
            option=_COMMAND,
        )
    kept = []
    for key in keys:
        entry = known[key]
        try:
            if store.remove(entry.kind, key):
                print(f"removed {key} ({entry.base or 'damaged'})")
            else:
                kept.append(key)
        except OSError as error:
            raise UserError(f"cannot remove {key}: {error.strerror}", option=_COMMAND) from error
    if kept:
        raise UserError(f"in use by a running process, and not removed: {', '.join(kept)}", option=_COMMAND)
