"""SIGKILL at every file boundary of a save and at random: a good checkpoint is found, and the end is the same."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.checkpoint.resume import find
from halfbyte.trainer import saving
from tests import launch, tiny
from tests.checkpoint.killer import at_each_touch
from tests.checkpoint.runs import Finished, assert_equal, options, run

ModelDir = Callable[..., Path]


@pytest.mark.faults
def test_every_state_that_a_kill_can_leave_is_resumed_from(
    finished: Finished, tmp_path: Path, monkeypatch
) -> None:
    """The directory is copied before each touch of a file while checkpoint-4 is saved and older ones go.

    A killed process leaves what the copies hold: what it had written is in the kernel's hands.
    """
    output, copies, save = tmp_path / "run", tmp_path / "copies", saving.AtomicSaves._save_checkpoint
    saving_now = False

    def copy(event: str, path: str) -> None:
        if saving_now:
            shutil.copytree(output, copies / f"{len(list(copies.iterdir())):03d}")

    def watched(self: saving.AtomicSaves, *args: object, **kwargs: object) -> None:
        nonlocal saving_now
        saving_now = self.state.global_step == 4
        try:
            save(self, *args, **kwargs)
        finally:
            saving_now = False

    copies.mkdir()
    at_each_touch(copy)
    monkeypatch.setattr(saving.AtomicSaves, "_save_checkpoint", watched)
    assert run("sft", [*finished.options(output), "--save_total_limit", "1"]) == 0
    monkeypatch.undo()
    states = sorted(copies.iterdir())
    assert len(states) > 30
    taken: dict[str, Path] = {}
    for state in states:
        found = find(str(state), "auto")
        assert found.path is not None
        assert not any("skipped" in line for line in found.lines), (state, found.lines)
        taken[Path(found.path).name] = state  # the last before the rename, and the last of all
    assert taken.keys() == {"checkpoint-2", "checkpoint-4"}
    print(f"{len(states)} states of the directory during one save")
    for state in (states[0], *taken.values()):
        assert run("sft", finished.options(state), "--resume_from_checkpoint", "auto") == 0
        assert_equal(finished.output, state)


PLACES = {
    "before the rename": ("os.rename", "_pending-checkpoint/checkpoint-4"),
    "directory": ("os.mkdir", "_pending-checkpoint/checkpoint-4"),
    "state": ("open", "_pending-checkpoint/checkpoint-4/trainer_state.json"),
    "manifest": ("open", "_pending-checkpoint/checkpoint-4/manifest.json"),
    "another rank": ("open", "_pending-checkpoint/checkpoint-4/progress_1.json"),
}
CASES = [
    (place, processes)
    for place in PLACES
    for processes in (1, 2)
    if place != "another rank" or processes == 2
]


@pytest.mark.parametrize(
    ("place", "processes"),
    [pytest.param(*case, marks=[pytest.mark.faults] if place else []) for place, case in enumerate(CASES)],
)
def test_a_kill_in_a_save(
    finished: Finished, model_dir: ModelDir, tmp_path: Path, place: str, processes: int, whole_on_two
) -> None:
    output = tmp_path / "run"
    event, path = PLACES[place]
    kill = {"KILL_EVENT": event, "KILL_PATH": path, "KILL_RANK": "1" if place == "another rank" else "0"}
    reference = finished if processes == 1 else whole_on_two()
    arguments = ["sft", *reference.options(output)]
    killed = _launch(processes, *arguments, module="tests.checkpoint.killer", **kill)
    assert killed.returncode != 0
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"], killed.stderr[-2000:]
    again = [*arguments, "--resume_from_checkpoint", "auto"]
    if processes == 1:
        assert run(again[0], again[1:]) == 0
    else:
        done = _launch(processes, *again)
        assert done.returncode == 0, done.stderr[-4000:]
    assert_equal(reference.output, output)


@pytest.mark.faults
def test_kills_at_random_moments_and_pairs_in_one_directory(tmp_path: Path) -> None:
    """A tenth of what `python -m tests.checkpoint.chaos` does by itself."""
    few = ("--kills", "10", "--pairs", "3", "--seed", "0", "--directory", str(tmp_path))
    done = launch.python("tests.checkpoint.chaos", *few, cwd=launch.ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def whole_on_two(tmp_path_factory: pytest.TempPathFactory, model_dir) -> Callable[[], Finished]:
    """The uninterrupted run of two processes, made when it is first asked for."""
    made: list[Finished] = []

    def get() -> Finished:
        if not made:
            root = tmp_path_factory.mktemp("two")
            rows = tiny.write_rows(root / "rows", tiny.conversations(20))
            made.append(Finished(root / "run", model_dir("llama"), rows))
            done = _launch(2, "sft", *options(model_dir("llama"), rows, root / "run", save_steps="2"))
            assert done.returncode == 0, done.stderr[-4000:]
        return made[0]

    return get


def _launch(processes: int, *arguments: str, module: str = "halfbyte", **extra: str):
    if processes == 1:
        return launch.python(module, *arguments, cwd=launch.ROOT, **extra)
    return launch.accelerate(*arguments, processes=processes, module=module, cwd=launch.ROOT, **extra)
