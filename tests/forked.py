"""``python -m MODULE`` without its imports: a process of a server that has imported what every run imports.

Importing torch, transformers, TRL and datasets takes longer than most runs of tiny models, and a launch on two ranks
does it three times. A server imports them once a session and a command begins as a fork of it: a process of its own,
with its own environment, directory and streams, in which nothing has run before. halfbyte itself is imported anew.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

IMPORTED = [
    "torch.distributed.run",
    "torch.distributed.fsdp",
    "accelerate.commands.launch",
    "bitsandbytes",
    "datasets",
    "peft",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "trl.trainer.reward_trainer",
    "trl.trainer.kto_trainer",
    "wandb",
]
# Read when a module is imported, which a fork is too late for.
READ_ON_IMPORT = ("HF_", "PYTHON", "TRANSFORMERS_", "TRITON_", "CUDA_")
KNOWN = {"HF_HUB_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "PYTHONPATH"}

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(IMPORTED)


def takes(environment: Mapping[str, str]) -> bool:
    """Whether ``environment`` differs from this process's in nothing that is read on import."""
    names = (environment.keys() | os.environ.keys()) - KNOWN
    changed = [name for name in names if environment.get(name) != os.environ.get(name)]
    return not any(name.startswith(READ_ON_IMPORT) for name in changed)


def run(
    module: str, arguments: Sequence[str], cwd: Path | None, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE ARGUMENTS``, as ``subprocess.run`` returns it.

    Raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds, with all that it started ended.
    """
    words = [module, *arguments]
    with tempfile.TemporaryDirectory() as scratch:
        streams = [Path(scratch, name) for name in ("stdout", "stderr")]
        process = CONTEXT.Process(
            target=_begin, args=(words, str(cwd or Path.cwd()), dict(environment), [str(s) for s in streams])
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            _end(process.pid)
            raise subprocess.TimeoutExpired(words, timeout, *(s.read_bytes() for s in streams))
        out, err = (stream.read_text(encoding="utf-8") for stream in streams)
        return subprocess.CompletedProcess(words, process.exitcode, out, err)


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns in a fork of the server, in which it is imported by name.

    Raises ``RuntimeError`` if the process ends without an answer.
    """
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        raise RuntimeError(f"{function.__name__} ended without an answer") from error
    finally:
        process.join()


def _answer(connection: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    connection.send(function(*arguments))


def _end(pid: int | None) -> None:
    """Kill ``pid`` and all its descendants."""
    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        process.kill()


def _begin(words: list[str], cwd: str, environment: Mapping[str, str], streams: list[str]) -> None:
    """What the interpreter does for ``python -m``: the environment, directory, streams and path, then the module."""
    sys.stdout.flush()
    sys.stderr.flush()
    for number, stream in enumerate(streams, start=1):
        opened = os.open(stream, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = [cwd, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if words[0] == "accelerate.commands.launch":
        _fork_ranks()
    try:
        _module(*words)
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves them out


def _module(module: str, *arguments: str) -> None:
    sys.argv[:] = [module, *arguments]
    sys.modules.pop(module, None)  # the launcher's, of which runpy would say that it is imported already
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _fork_ranks() -> None:
    """Let torchrun's agent fork the ranks from this process, where it would execute ``python -u -m MODULE``."""
    from torch.distributed import run as torchrun

    stock = torchrun.config_from_args

    def forking(args: Any) -> Any:
        config, command, given = stock(args)
        assert (command, given[:2]) == (sys.executable, ["-u", "-m"]), (command, given)
        config.start_method = "fork"
        return config, _rank, given[2:]

    torchrun.config_from_args = forking


def _rank(*words: str) -> None:
    # The agent's handlers are the agent's.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    try:
        _module(*words)
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        atexit._run_exitfuncs()
