"""``halfbyte cache ls|rm``: what the store of quantized bases holds, and how to empty it."""

import json
import time

from halfbyte import store
from halfbyte.errors import UserError

USAGE = "usage: halfbyte cache ls [--json]\n       halfbyte cache rm KEY... | --all"


def main(arguments: list[str]) -> int:
    """Run one cache command; raises :class:`UserError` for an unknown key, or one in use."""
    match arguments:
        case ["ls"] | ["ls", "--json"]:
            _list(as_json=len(arguments) == 2)
        case ["rm", "--all"]:
            _remove([entry.key for entry in store.entries()])
        case ["rm", *keys] if keys and not any(key.startswith("-") for key in keys):
            _remove(keys)
        case ["-h" | "--help"]:
            print(USAGE)
        case _:
            raise UserError(f"halfbyte cache: {' '.join(arguments) or 'nothing'} is no command\n{USAGE}")
    return 0


def _list(*, as_json: bool) -> None:
    entries = store.entries()
    if as_json:
        print(json.dumps([vars(entry) for entry in entries], indent=2))
        return
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        state = "in use" if entry.in_use else ""
        print(f"{entry.key}  {entry.size / 2**30:8.2f} GiB  {used}  {entry.base}  {state}".rstrip())
    total = sum(entry.size for entry in entries)
    print(
        f"{len(entries)} quantized bases, {total / 2**30:.2f} of {store.BOUND / 2**30:.0f} GiB, in {store.root()}"
    )


def _remove(keys: list[str]) -> None:
    known = {entry.key: entry for entry in store.entries()}
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise UserError(
            f"no quantized base {unknown[0]!r} in {store.root()}; `halfbyte cache ls` shows the keys"
        )
    kept = [key for key in keys if not store.remove(key)]
    for key in keys:
        if key not in kept:
            print(f"removed {key} ({known[key].base})")
    if kept:
        raise UserError(f"in use by a running process, and left as it is: {', '.join(kept)}")
