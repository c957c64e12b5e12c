"""``python -m tests.checkpoint.killer ARGUMENTS``: halfbyte, killed when it touches a file that is named.

KILL_EVENT is an audit event of Python (`open`, `os.rename`, ...), KILL_PATH what the path must contain, and
KILL_RANK the rank. The product has no switches for its tests.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

# What changes a directory, and `open`, which writing, hashing and forcing to disk begin with.
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile")


def at_each_touch(do: Callable[[str, str], None]) -> None:
    """Call ``do(event, path)`` before each event of this process, except those that ``do`` itself causes."""
    busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy or event not in EVENTS:
            return
        busy = True
        try:
            do(event, " ".join(str(argument) for argument in arguments[:2]))
        finally:
            busy = False

    sys.addaudithook(hook)


def main() -> int:
    """Run the command line until the event comes."""
    wanted, path, rank = (os.environ[f"KILL_{name}"] for name in ("EVENT", "PATH", "RANK"))

    def kill(event: str, where: str) -> None:
        if event == wanted and path in where:
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ.get("RANK", "0") == rank:
        at_each_touch(kill)
    from halfbyte.cli import main as command

    return command()


if __name__ == "__main__":
    raise SystemExit(main())
