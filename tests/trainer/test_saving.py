"""What a save leaves on disk, what it removes, and how it fails."""

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from transformers.trainer import safe_globals

from halfbyte.checkpoint import manifest
from halfbyte.checkpoint.resume import find
from halfbyte.trainer import saving
from tests.checkpoint.killer import at_each_touch
from tests.checkpoint.runs import Finished, assert_equal, entries, options, run

Cut = Callable[..., Path]


def names(output: Path) -> set[str]:
    return {path.name for path in output.glob("checkpoint-*")}


def test_a_checkpoint_is_complete_and_holds_no_pickled_arguments(finished: Finished) -> None:
    output = finished.output
    assert names(output) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert not (output / saving.PENDING).exists()
    assert not list(output.rglob("training_args.bin"))
    files = entries(output / "checkpoint-4")
    expected = {
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    assert expected | {"progress_0.json", "training_args.json", "tokenizer.json"} <= files.keys()
    told = manifest.read(output / "checkpoint-4")
    record = json.loads((output / "run.json").read_text())
    assert (told.step, told.world_size, told.finite, told.resumable) == (4, 1, True, True)
    assert told.run_id == record["run_id"]
    assert told.config["learning_rate"] == 0.01
    assert told.inputs["data"] == record["data"]["sha"]
    assert told.data_position["batches_per_rank"] == 4
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_everything_pickled_loads_without_running_code(finished: Finished) -> None:
    for path in (finished.output / "checkpoint-6").iterdir():
        if path.suffix in (".pt", ".pth"):
            with safe_globals():  # NumPy's, which the generators' state needs
                torch.load(path, weights_only=True)


def test_rotation_keeps_the_best_and_the_newest(finished: Finished, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = {
        "save_steps": "1",
        "save_total_limit": "1",
        "eval_strategy": "steps",
        "eval_steps": "1",
        "load_best_model_at_end": "true",
        "metric_for_best_model": "eval_loss",
        "greater_is_better": "true",  # the loss falls: the first stays the best
    }
    assert run("sft", options(finished.model, finished.rows, output, **given)) == 0
    assert names(output) == {"checkpoint-1", "checkpoint-6"}
    state = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(output / "checkpoint-1")
    best = (output / "checkpoint-1" / "adapter_model.safetensors").read_bytes()
    assert (output / "adapter_model.safetensors").read_bytes() == best


def test_rotation_keeps_the_last_that_is_good(finished: Finished, tmp_path: Path, monkeypatch) -> None:
    """Checkpoints with weights that are not finite push nothing out."""
    verdicts = iter([True, False, False])
    monkeypatch.setattr(saving.AtomicSaves, "_trained_weights_are_finite", lambda trainer: next(verdicts))
    output = tmp_path / "run"
    assert run("sft", [*finished.options(output), "--save_total_limit", "1"]) == 0
    assert names(output) == {"checkpoint-2", "checkpoint-6"}
    assert find(str(output), "auto").path == str(output / "checkpoint-2")


@contextmanager
def full(at: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that is full from step 4 on: checked before, at torch's writer, or at the kernel's."""
    make_room, upstream = saving.AtomicSaves._make_room, torch.save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def step_4(self: saving.AtomicSaves) -> bool:
        return self.state.global_step == 4

    def begin(self: saving.AtomicSaves, needed: int) -> None:
        if step_4(self) and at == "checked":
            usage = shutil.disk_usage("/")._replace(free=2 * needed - 1)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        make_room(self, needed)
        if step_4(self) and at == "kernel":  # cuts optimizer.pt short, in torch's C++
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))

    def save(value: object, path: object, *args: object, **kwargs: object) -> None:
        if str(path).endswith("checkpoint-4/optimizer.pt") and at == "torch":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        upstream(value, path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(saving.AtomicSaves, "_make_room", begin)
        patched.setattr(torch, "save", save)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()


@pytest.mark.parametrize(
    "at", ["torch", *(pytest.param(at, marks=pytest.mark.faults) for at in ("checked", "kernel"))]
)
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    finished: Finished, tmp_path: Path, monkeypatch, capsys, at: str
) -> None:
    output = tmp_path / "run"
    with full(at, monkeypatch):
        assert run("sft", finished.options(output)) == 1
    told = capsys.readouterr().err
    assert f"cannot save {output / 'checkpoint-4'}" in told
    assert "bytes free" in told
    assert f"{output / 'checkpoint-2'} is whole" in told
    assert "Traceback" not in told
    assert len(told[told.index("error:") :].splitlines()) <= 3
    assert names(output) == {"checkpoint-2"}
    assert not (output / saving.PENDING).exists()
    assert run("sft", finished.options(output), "--resume_from_checkpoint", "auto") == 0
    assert_equal(finished.output, output)


@contextmanager
def read_only(output: Path) -> Iterator[None]:
    """Everything in ``output`` as on a file system that has become read-only under the run.

    By a mount over it, where this process may mount; else every touch of a file fails as it would there.
    """
    mounted = _mount("--bind", str(output), str(output))
    if mounted:
        assert _mount("-o", "remount,ro,bind", str(output))
    refusing = not mounted

    def refuse(event: str, path: str) -> None:
        # Of a whole tree, what is in it is refused, which `ignore_errors` passes over.
        reads = event == "shutil.rmtree" or (event == "open" and not path.endswith((" w", " wb", " a")))
        if refusing and path.startswith(str(output)) and not reads:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    if refusing:
        at_each_touch(refuse)
    try:
        yield
    finally:
        refusing = False
        if mounted:
            subprocess.run(["umount", str(output)], check=True)


def _mount(*words: str) -> bool:
    try:
        return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def before_the_save(step: int, do: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    save = saving.AtomicSaves._save_checkpoint

    def wrapped(self: saving.AtomicSaves, *args: object, **kwargs: object) -> None:
        if self.state.global_step == step:
            do()
        save(self, *args, **kwargs)

    monkeypatch.setattr(saving.AtomicSaves, "_save_checkpoint", wrapped)


def assert_a_clear_end(told: str, output: Path, reason: str) -> None:
    assert f"cannot save {output / 'checkpoint-4'}" in told
    assert reason in told
    assert "bytes free" not in told
    assert "Traceback" not in told


@pytest.mark.faults
def test_a_disk_that_becomes_read_only(finished: Finished, tmp_path: Path, monkeypatch, capsys) -> None:
    output = tmp_path / "run"
    with ExitStack() as until_the_end:
        before_the_save(4, lambda: until_the_end.enter_context(read_only(output)), monkeypatch)
        assert run("sft", finished.options(output)) == 1
    told = capsys.readouterr().err
    assert_a_clear_end(told, output, "Read-only file system")
    assert f"{output / 'checkpoint-2'} is whole" in told
    monkeypatch.undo()
    assert names(output) == {"checkpoint-2"}
    assert run("sft", finished.options(output), "--resume_from_checkpoint", "auto") == 0
    assert_equal(finished.output, output)


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["moved", "removed"])
def test_a_directory_taken_away_in_mid_run(
    finished: Finished, tmp_path: Path, monkeypatch, capsys, fault: str
) -> None:
    """It is not made anew; where it was only moved, its checkpoint is resumed from."""
    output, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    take = {"moved": lambda: output.rename(elsewhere), "removed": lambda: shutil.rmtree(output)}
    before_the_save(4, take[fault], monkeypatch)
    assert run("sft", finished.options(output)) == 1
    assert_a_clear_end(capsys.readouterr().err, output, "No such file")
    assert not output.exists()
    monkeypatch.undo()
    if fault == "moved":
        assert run("sft", finished.options(elsewhere), "--resume_from_checkpoint", "auto") == 0
        assert_equal(finished.output, elsewhere)
