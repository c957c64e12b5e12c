"""The command line: recipes by name, commands by name, one exit code for each way to end."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback

from halfbyte import recipe as recipes
from halfbyte.errors import Halted, Stopped, UserError

USAGE = """\
usage: halfbyte RECIPE --config FILE [--key value ...]   train
       halfbyte RECIPE --help                            every option of a recipe
       halfbyte recipes [--json]                         the installed recipes
       halfbyte doctor [--launch FILE] [--json]          is this machine ready, and what would a launch file run
       halfbyte cache ls|rm                              the bases that were quantized before
       halfbyte verify DIR                               check a run or a checkpoint against its manifest
       halfbyte demo [--output_dir DIR]                  the offline quick start: base, sft, dpo

On several processes: accelerate launch --config_file launch/ddp.yaml -m halfbyte RECIPE --config FILE
--debug shows tracebacks. Exit codes: 0 done, 2 a mistake in the input, 130 SIGINT, 138 SIGUSR1, 143 SIGTERM,
1 anything else.
"""

# Set by accelerate launch and by torchrun in the processes that they start.
_LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; the console script and ``python -m halfbyte``."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    arguments, debug = _take_debug(arguments)
    try:
        return _run(arguments)
    except UserError as error:
        return _fail(error, f"error: {error}", 2, debug)
    except Stopped as stopped:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # the launcher passes on a signal once a rank has ended
        _say(str(stopped))
        return stopped.code
    except Halted as error:
        if debug:
            traceback.print_exc()
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt as interrupt:
        return _fail(interrupt, "interrupted", 128 + signal.SIGINT, debug=False)
    except Exception as error:
        text = f"error: {type(error).__name__}: {_first_lines(str(error))}\n(--debug shows the traceback)"
        return _fail(error, text, 1, debug)


def _fail(error: BaseException, message: str, code: int, debug: bool) -> int:
    """Say why once per job, and return the exit code; a rank among others does not wait for them."""
    distributed = sys.modules.get("halfbyte.resilience.watch")
    if debug:
        traceback.print_exception(error)
    if distributed is None:
        _say(message)
        return code
    explanation = distributed.explain(error)
    if type(error).__name__ != "FailedElsewhereError" and distributed.speaks_first():
        rank = os.environ.get("RANK", "0")
        head = "" if rank == "0" else f"rank {rank}: "
        print(
            f"{head}{message}" if explanation is None else f"{head}{message}\n{explanation}", file=sys.stderr
        )
    distributed.leave(code)
    return code


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        from importlib.metadata import version

        print(version("halfbyte"))
        return 0
    # At import bitsandbytes reports that an optional kernel package is missing, which halfbyte does not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if name == "recipes":
        return _list(rest)
    if name == "demo":
        from halfbyte import demo

        return demo.main(rest)
    if name == "cache":
        from halfbyte.commands import cache

        return cache.main(rest)
    if name == "doctor":
        from halfbyte.plan import doctor

        return doctor.main(rest)
    if name == "verify":
        from halfbyte.commands import verify

        return verify.main(rest)
    if name in recipes.COMMANDS:
        raise UserError(f"`halfbyte {name}` is announced but not part of this version; see README.md")
    if name.startswith("-"):
        raise UserError(f"the recipe comes first: halfbyte RECIPE {name} ...")
    _end_with_the_launcher()
    recipe = recipes.load(name)
    from halfbyte import run

    return run.main(name, recipe, rest)


def _end_with_the_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher dies: an orphan would train on, unseen."""
    if sys.platform != "linux" or not any(name in os.environ for name in _LAUNCHED):
        return
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was asked
        raise Stopped(signal.SIGTERM, "the launcher is gone")


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Split off our ``--debug``, which has no value; TRL's own option of that name has one."""
    followed = [*arguments[1:], "--"]
    kept = [
        word
        for place, (word, after) in enumerate(zip(arguments, followed, strict=False))
        if word != "--debug" or (place > 0 and not after.startswith("-"))
    ]
    return kept, len(kept) < len(arguments)


def _list(arguments: list[str]) -> int:
    unknown = [argument for argument in arguments if argument != "--json"]
    if unknown:
        raise UserError(f"halfbyte recipes: unknown option {unknown[0]!r}; the only one is --json")
    listed = recipes.entries()
    recipes.check(listed)
    if arguments:
        print(json.dumps([vars(entry) for entry in listed], indent=2))
        return 0
    width = max((len(entry.name) for entry in listed), default=0)
    for entry in listed:
        print(f"{entry.name:<{width}}  {entry.package} {entry.version}  {entry.object}")
    if not listed:
        print(f"no recipes are installed (entry points in the group {recipes.GROUP!r})")
    return 0


def _say(message: str) -> None:
    """Print to standard error, once per job: under a launcher only the first local rank speaks."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(message, file=sys.stderr)


def _first_lines(text: str, lines: int = 8) -> str:
    return "\n".join(text.splitlines()[:lines])
