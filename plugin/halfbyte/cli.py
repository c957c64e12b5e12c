"""The command line: commands and recipes by name, one exit code for each way to end."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback

from halfbyte import commands
from halfbyte import recipe as recipes
from halfbyte.errors import FailedElsewhereError, Halted, Stopped, UserError
from halfbyte.terminal import descriptors, quiet, streams
from halfbyte.terminal.wording import CONFIGURATIONS, on_local_rank_0, show

_MAX_LINES = 8  # of an error that is not ours; with our own lines around it at most ten


def usage() -> str:
    """The help of ``halfbyte`` itself, from the table of commands."""
    calls = [
        ("halfbyte RECIPE --config FILE [--key value ...]", "train"),
        ("halfbyte RECIPE --help [all]", "the most used options of a recipe, or all"),
        *((command.usage, command.summary) for command in commands.TABLE.values()),
    ]
    width = max(len(call) for call, _ in calls)
    lines = [f"{call:<{width}}   {summary}" for call, summary in calls]
    indent = "\n       "
    return f"""\
usage: {indent.join(lines)}

On several processes: accelerate launch --config_file launch/ddp.yaml -m halfbyte RECIPE --config FILE
--debug shows tracebacks. Exit codes: 0 done, 2 invalid input, 130 SIGINT, 138 SIGUSR1, 143 SIGTERM,
1 anything else.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; the console script and ``python -m halfbyte``."""
    if argv is None:  # this process is the command's own
        descriptors.last()
    arguments = sys.argv[1:] if argv is None else list(argv)
    arguments, debug = _take_debug(arguments)
    with streams.clean():
        return _ended(arguments, debug)


def _ended(arguments: list[str], debug: bool) -> int:
    """Run the command, and print how it ended."""
    try:
        return _run(arguments) or _unprinted(arguments)
    except UserError as error:
        return _fail(error, f"error: {error}", 2, debug)
    except Stopped as stopped:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(
                number, signal.SIG_IGN
            )  # the launcher sends a signal to the others once a rank has ended
        _print(str(stopped))
        if (watch := sys.modules.get("halfbyte.resilience.watch")) is not None:
            watch.speaks_first()  # what fails on the others, which wait for this one, goes unsaid
        return stopped.code
    except Halted as error:
        if debug:
            _show_traceback(error, message=not on_local_rank_0())
        _print(f"error: {error}")
        return 1
    except KeyboardInterrupt as interrupt:
        return _fail(interrupt, "interrupted", 128 + signal.SIGINT, debug=False)
    except BaseException as error:
        # A panic of a library written in Rust, such as tokenizers, is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = str(error) if debug else f"{_first_lines(str(error))}\n(--debug shows the traceback)"
        return _fail(error, f"error: {type(error).__name__}: {said}", 1, debug)


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        from importlib.metadata import version

        print(version("halfbyte"))
        return 0
    quiet.advertisements()
    quiet.long_reports()
    quiet.experimental()
    if name in commands.TABLE:
        return commands.TABLE[name].main(rest)
    if name.lstrip("-").lower() in ("v", "version"):
        raise UserError(f"{name}: `halfbyte --version` prints the version")
    if name.endswith(CONFIGURATIONS):
        raise UserError(f"the recipe comes first: halfbyte RECIPE --config {shlex.quote(name)}")
    if name.startswith("-"):
        raise UserError(f"the recipe comes first: halfbyte RECIPE {shlex.quote(name)} ...")
    return _train(name, rest)


def _unprinted(arguments: list[str]) -> int:
    """1 if what a command is for, its output, could not be written; a run's files say what it did."""
    name = arguments[0] if arguments else "--help"
    if name == "demo" or (name not in commands.TABLE and name != "help" and not name.startswith("-")):
        return 0
    if (why := descriptors.refused()) is not None:
        _print(f"error: cannot write to standard output: {why}")
    return int(why is not None)


def _train(name: str, arguments: list[str]) -> int:
    """Run the recipe ``name``; what needs no import of torch is refused before it."""
    from halfbyte.resilience.orphan import end_with_the_launcher

    end_with_the_launcher()
    recipe, written = recipes.named(name, arguments)
    from halfbyte import run

    return run.main(name, recipe, arguments, written)


def _fail(error: BaseException, message: str, code: int, debug: bool) -> int:
    """Print the reason once per job and return the exit code; a rank among others ends without waiting for them."""
    watch = sys.modules.get("halfbyte.resilience.watch")
    if watch is None:
        speaks, head, explanation = on_local_rank_0(), "", None
    else:
        explanation = watch.explain(error)
        speaks = not isinstance(error, FailedElsewhereError) and watch.speaks_first()
        rank = os.environ.get("RANK", "0")
        head = "" if rank == "0" else f"rank {rank}: "
    if debug:
        _show_traceback(error, message=not speaks)
    if speaks:
        show(f"{head}{message}" if explanation is None else f"{head}{message}\n{explanation}")
    if watch is not None:
        watch.leave(code)
    return code


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Remove our ``--debug``, which has no value; TRL's own option of that name has one."""
    followed = [*arguments[1:], "--"]
    kept = [
        word
        for place, (word, after) in enumerate(zip(arguments, followed, strict=False))
        if word != "--debug" or (place > 0 and not after.startswith("-"))
    ]
    return kept, len(kept) < len(arguments)


def _print(message: str) -> None:
    """Print to standard error, once per job: under a launcher only on the first local rank."""
    if on_local_rank_0():
        show(message)


def _show_traceback(error: BaseException, *, message: bool) -> None:
    """Print where ``error`` comes from, and what it says only with ``message``: what follows says it."""
    lines, said = traceback.format_exception(error), traceback.format_exception_only(error)
    if not message and lines[-len(said) :] == said:
        own = next(
            i for i, line in enumerate(said) if not line.startswith(" ")
        )  # after a line of a SyntaxError
        del lines[own - len(said)]  # its notes remain
    show("".join(lines).rstrip("\n"))


def _first_lines(text: str) -> str:
    return "\n".join(text.splitlines()[:_MAX_LINES])
