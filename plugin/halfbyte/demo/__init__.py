"""The offline quick start: a base trained on Python's own library, then SFT, then DPO, on two processes."""

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from halfbyte.demo import base, corpus, stages, summary
from halfbyte.errors import UserError
from halfbyte.files import next_free
from halfbyte.terminal.wording import shorten

__all__ = ["run"]

_OPTION = "--output_dir"
_PARTS = ("data", *summary.RUNS, *(f"{name}{end}" for name in summary.RUNS for end in (".log", ".yaml")))


def run(output_dir: Path, size: stages.Size | None = None) -> int:
    """Train base, SFT and DPO into ``output_dir``, print the results and return the exit code.

    An earlier ``output_dir`` is moved aside. The base comes from the cache if it was trained before.
    """
    started = time.monotonic()
    size = size or stages.Size()
    console = Console()
    directory = output_dir.absolute()
    _require_place(directory)
    console.print("reading Python's standard library", highlight=False)
    source = corpus.collect()
    if directory.is_dir() and any(directory.iterdir()):
        kept = next_free(directory.parent, f"{directory.name}.")
        directory.rename(kept)
        console.print(f"the earlier {directory} is now {kept}", highlight=False, soft_wrap=True)
    directory.mkdir(parents=True, exist_ok=True)
    data = directory / "data"
    stages.write_data(source, data, size)
    console.print(
        f"{len(source.texts)} texts, {len(source.pairs):,} pairs of signature and docstring in {data}",
        highlight=False,
        soft_wrap=True,
    )
    with _terminated_as_exception():
        try:
            _base(source, directory, size, console)
            on_base = {"model_name_or_path": str(directory / "base")}
            sft = {**on_base, **_places(directory, "sft"), **stages.sft_training(size)}
            stages.train("sft", "sft", sft, directory, console)
            start = {**on_base, "adapter_name_or_path": str(directory / "sft")}
            dpo = {**start, **_places(directory, "dpo"), **stages.dpo_training(size)}
            stages.train("dpo", "dpo", dpo, directory, console)
        except stages.StageFailed as failure:
            print(failure, file=sys.stderr)
            return failure.status
        summary.show(directory, console)
    console.print(f"{time.monotonic() - started:.0f} s in all", highlight=False)
    for line in (
        f"configurations to begin from: {directory / 'sft.yaml'}, {directory / 'dpo.yaml'}",
        f"next: halfbyte merge {shlex.quote(str(directory / 'dpo'))} --output_dir MERGED",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return 0


def _require_place(directory: Path) -> None:
    """Refuse a directory that cannot be written, or that holds something else than an earlier demo.

    Nothing is left behind: a directory that is made to try it is removed again.
    """
    try:
        present = directory.exists()
        if present and not directory.is_dir():
            raise UserError(f"{directory} is a file; name a directory", option=_OPTION)
        strange = (
            sorted(path.name for path in directory.iterdir() if path.name not in _PARTS) if present else []
        )
        if strange:
            raise UserError(
                f"{directory} holds {shorten(strange[0])}, which is not a demo's, and only an earlier demo is moved "
                f"aside; choose another",
                option=_OPTION,
            )
        if directory.is_symlink() or Path.cwd().is_relative_to(directory.resolve()):
            raise UserError(
                f"{directory} is a link or the working directory, which is not moved aside; choose another",
                option=_OPTION,
            )
        if not present:
            missing = [directory, *(parent for parent in directory.parents if not parent.exists())]
            directory.mkdir(parents=True)
            for made in missing:
                made.rmdir()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot write {shorten(str(directory), 200)}: {reason}", option=_OPTION) from error


def _base(source: corpus.Corpus, directory: Path, size: stages.Size, console: Console) -> None:
    training = stages.base_training(size)
    run = directory / "base"
    entry = base.cache_directory() / base.cache_key(source, training)
    if base.restore(entry, run):
        console.print(f"base: trained earlier, from {entry}", highlight=False, soft_wrap=True)
        return
    untrained = directory / "data" / "untrained"
    base.write_untrained(source, untrained)
    places = {**_places(directory, "base"), "dataset_name": str(directory / "data" / "text")}
    stages.train(
        "base", "pretrain", {"model_name_or_path": str(untrained), **places, **training}, directory, console
    )
    try:
        base.store(run, entry)
    except OSError as error:
        console.print(f"base: not kept for the next demo, {entry}: {error.strerror}", highlight=False)


def _places(directory: Path, name: str) -> dict[str, str]:
    return {"dataset_name": str(directory / "data" / name), "output_dir": str(directory / name)}


@contextlib.contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that the training processes are stopped before this one ends."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
