"""Standard streams that are gone, full or closed: commands end with their own code, and a run goes on to its end."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from tqdm import tqdm

from halfbyte.terminal import descriptors
from tests import launch
from tests.checkpoint.runs import Finished, assert_equal, run

BROKEN = {
    "full": "> /dev/full",
    "all full": "> /dev/full 2>&1",
    "closed": ">&-",
    "all closed": "<&- >&- 2>&-",
    "a reader that left": "| true",
}
CODES = {"--version": 0, "recipes --json": 0, "stf": 2}


def shell(words: str, redirection: str) -> subprocess.CompletedProcess[str]:
    line = f"set -o pipefail; {sys.executable} -m halfbyte {words} {redirection}"
    return subprocess.run(
        ["bash", "-c", line], env=launch.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, check=False, timeout=launch.TIMEOUT,
    )  # fmt: skip


@pytest.mark.parametrize("place", BROKEN)
@pytest.mark.parametrize("words", CODES)
def test_a_command_ends_with_its_own_code(words: str, place: str) -> None:
    done = shell(words, BROKEN[place])
    unwritten = CODES[words] == 0 and "full" in place
    assert done.returncode == (1 if unwritten else CODES[words])
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if place == "full" and unwritten:
        assert done.stderr == "error: cannot write to standard output: No space left on device\n"


def broken_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@contextmanager
def streams_on(descriptor: int) -> Iterator[None]:
    """Standard output and error as `descriptors.last` leaves them, on ``descriptor``."""
    with (
        redirect_stdout(descriptors.lasting(sys.__stdout__, descriptor)),
        redirect_stderr(descriptors.lasting(sys.__stderr__, descriptor)),
    ):
        yield
    os.close(descriptor)


@pytest.mark.parametrize("gone", [broken_pipe, full_disk])
def test_a_run_goes_on_without_its_terminal(
    gone: Callable[[], int], finished: Finished, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with streams_on(gone()):
        assert run("sft", finished.options(output)) == 0
    assert_equal(finished.output, output)
    assert json.loads((output / "run.json").read_text())["status"] == "completed"


@pytest.mark.parametrize("gone", [broken_pipe, full_disk])
def test_whoever_writes_is_not_told(gone: Callable[[], int]) -> None:
    with streams_on(gone()):
        print("x" * 100_000, flush=True)
        print("x" * 100_000, file=sys.stderr)
        for _ in tqdm(range(3), file=sys.stderr):
            pass
        assert descriptors.refused() == (None if gone is broken_pipe else "No space left on device")


def test_a_full_pipe_that_does_not_block_drops_what_it_cannot_take() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    stream = descriptors.lasting(sys.__stdout__, write)
    stream.write("x" * 1_000_000)
    stream.flush()
    assert os.read(read, 10) == b"x" * 10
    os.close(read)
    os.close(write)


def test_what_an_encoding_lacks_is_escaped() -> None:
    read, write = os.pipe()

    class Ascii:
        encoding, line_buffering, write_through = "ascii", False, False

        def flush(self) -> None: ...

    stream = descriptors.lasting(Ascii(), write)
    print("caf\u00e9", file=stream, flush=True)
    assert os.read(read, 100) == b"caf\\xe9\n"
    os.close(read)
    os.close(write)


@pytest.mark.faults
@pytest.mark.parametrize("place", BROKEN)
def test_a_process_trains_to_its_end(finished: Finished, tmp_path: Path, place: str) -> None:
    output = tmp_path / "run"
    done = shell(" ".join(["sft", *finished.options(output)]), BROKEN[place])
    assert done.returncode == 0, done.stderr[-2000:]
    assert_equal(finished.output, output)
