"""Which checkpoint a resume takes, what it refuses, and what it sets aside."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import wandb

from halfbyte import resolve
from halfbyte.checkpoint import changes, history, manifest
from halfbyte.checkpoint.resume import find
from halfbyte.errors import UserError
from halfbyte.tracking import Tracker
from tests.checkpoint.runs import STEPS, Finished, assert_equal, options, read_rows, run
from tests.checkpoint.test_manifest import recorded
from tests.tracking import wandb_file

STATES = ("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")
STATE = {
    "global_step": 10, "max_steps": 20, "epoch": 1.5, "num_train_epochs": 3, "total_flos": 1.0,
    "log_history": [], "stateful_callbacks": {}, "best_metric": None, "best_global_step": None,
}  # fmt: skip
DAMAGES = ("truncated", "flipped", "emptied", "deleted")


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    if kind == "deleted":
        path.unlink()
    elif kind == "flipped":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :])
    else:
        path.write_bytes(content[:middle] if kind == "truncated" else b"")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A run directory with checkpoint-2 and checkpoint-10, of weights and empty states."""
    for step in (2, 10):
        directory = tmp_path / "run" / f"checkpoint-{step}"
        directory.mkdir(parents=True)
        (directory / "weights").write_bytes(b"w" * step)
        for name in STATES:
            (directory / name).touch()
        (directory / "trainer_state.json").write_text(json.dumps({**STATE, "global_step": step}))
        manifest.write(directory, recorded(step=step))
    return tmp_path / "run"


def test_the_newest_is_the_highest_step(checkpoints: Path) -> None:
    assert find(str(checkpoints), "auto").path == str(checkpoints / "checkpoint-10")
    assert find(str(checkpoints), "True").path == str(checkpoints / "checkpoint-10")


@pytest.mark.parametrize("wanted", [None, "false", False])
def test_nothing_is_resumed_unasked(checkpoints: Path, wanted: str | bool | None) -> None:
    assert find(str(checkpoints), wanted).path is None


@pytest.mark.parametrize("stray", ["checkpoint-999", "checkpoint-best", "checkpoint-", "tmp-checkpoint-11"])
def test_stray_directories(checkpoints: Path, stray: str) -> None:
    (checkpoints / stray).mkdir()
    found = find(str(checkpoints), "auto")
    assert found.path == str(checkpoints / "checkpoint-10")
    skipped = any(line.startswith(f"skipped {stray}:") for line in found.lines)
    assert skipped is (stray == "checkpoint-999")


@pytest.mark.parametrize(
    ("given", "why"), [({"finite": False}, "not finite"), ({"resumable": False}, "save_only_model")]
)
def test_what_cannot_be_continued_is_skipped(checkpoints: Path, given: dict, why: str) -> None:
    newest = checkpoints / "checkpoint-10"
    (newest / "manifest.json").unlink()
    manifest.write(newest, recorded(step=10, **given))
    found = find(str(checkpoints), "auto")
    assert found.path == str(checkpoints / "checkpoint-2")
    assert why in found.lines[0]
    with pytest.raises(UserError, match=why):
        find(str(checkpoints), str(newest))


@pytest.mark.parametrize("name", STATES)
def test_a_checkpoint_without_a_state_is_skipped_though_it_verifies(checkpoints: Path, name: str) -> None:
    """Upstream would start that state over without a word."""
    newest = checkpoints / "checkpoint-10"
    (newest / name).unlink()
    (newest / "manifest.json").unlink()
    manifest.write(newest, recorded(step=10))
    assert manifest.check(newest)[1] == []
    found = find(str(checkpoints), "auto")
    assert found.path == str(checkpoints / "checkpoint-2")
    assert f"it holds no {name}" in found.lines[0]


def test_a_checkpoint_of_another_step_is_skipped(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-20")
    found = find(str(checkpoints), "auto")
    assert found.path == str(checkpoints / "checkpoint-10")
    assert found.lines[0].startswith("skipped checkpoint-20: its manifest is that of checkpoint-2")
    with pytest.raises(UserError, match="renamed or copied"):
        find(str(checkpoints), str(checkpoints / "checkpoint-20"))
    assert (checkpoints / "checkpoint-20").is_dir(), "nothing was moved"


def test_only_an_earlier_run_is_moved_aside(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why(output: Path | str, *inputs: Path) -> str:
        return str(history.not_to_be_moved(Path(output), map(str, inputs)))

    foreign, link, base = tmp_path / "thesis", tmp_path / "link", checkpoints / "checkpoint-2" / "base"
    foreign.mkdir()
    assert why(foreign) == why(tmp_path / "new") == "None"
    (foreign / "thesis.tex").touch()
    assert "holds no run" in why(foreign)
    assert why(checkpoints) == "None"
    link.symlink_to(checkpoints)
    assert "is a link" in why(link)
    base.mkdir()
    assert "which this run reads" in why(checkpoints, base)
    assert "which this run reads" in why(checkpoints, checkpoints)
    assert why(checkpoints, foreign, tmp_path / "no-such", Path("/"), tmp_path, Path("x" * 300)) == "None"
    (foreign / "deep").mkdir()
    (foreign / "deep" / "train.jsonl").symlink_to(checkpoints / "metrics.jsonl")
    assert "which this run reads" in why(checkpoints, foreign), "a link in a directory of the data"
    assert why(checkpoints, tmp_path) == "None"
    monkeypatch.chdir(checkpoints / "checkpoint-2")
    for above in (".", "..", "/", str(checkpoints)):
        assert "is the working directory or above it" in why(above)


def test_a_checkpoint_that_is_a_link_is_skipped(checkpoints: Path, tmp_path: Path) -> None:
    (checkpoints / "checkpoint-11").symlink_to(checkpoints / "checkpoint-2")
    assert find(str(checkpoints), "auto").lines[0] == "skipped checkpoint-11: it is a link"


def test_checkpoints_none_of_which_verifies_are_all_named(checkpoints: Path) -> None:
    damage(checkpoints / "checkpoint-10" / "weights", "flipped")
    damage(checkpoints / "checkpoint-2" / "weights", "deleted")
    with pytest.raises(UserError) as caught:
        find(str(checkpoints), "auto")
    told = str(caught.value)
    assert "checkpoint-10: weights has changed content" in told
    assert "checkpoint-2: weights is missing" in told
    assert len(told.splitlines()) <= 10


def test_a_foreign_directory_is_not_started_over_in(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert "holds no run" in str(find(str(tmp_path), "auto").problem(str(tmp_path), overwrite=False))


def test_a_path_outside_the_output_directory_needs_a_new_one(checkpoints: Path, tmp_path: Path) -> None:
    found = find(str(checkpoints), str(checkpoints / "checkpoint-2"))
    assert found.problem(str(checkpoints), overwrite=False) is None
    assert found.problem(str(tmp_path / "new"), overwrite=False) is None
    assert "is not in it" in str(found.problem(str(tmp_path), overwrite=False))


def test_what_comes_after_the_checkpoint_is_set_aside(checkpoints: Path) -> None:
    rows = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "l'
    (checkpoints / "metrics.jsonl").write_text(text)
    told = find(str(checkpoints), str(checkpoints / "checkpoint-2")).prepare(str(checkpoints))
    assert [row["step"] for row in read_rows(checkpoints)] == [1, 2]
    assert (checkpoints / "_earlier" / "1" / "metrics.jsonl").read_text() == text
    assert (checkpoints / "_earlier" / "1" / "checkpoint-10" / "weights").is_file()
    assert [path.name for path in history.checkpoints(checkpoints)] == ["checkpoint-2"]
    assert len(told) == 2


OPTIONS = {"learning_rate": 1e-4, "seed": 42, "output_dir": "a", "logging_steps": 1, "hub_token": "secret"}


def test_options_that_do_not_matter_pass() -> None:
    now = {**OPTIONS, "output_dir": "b", "logging_steps": 5, "hub_token": "x", "world_size": 1}
    assert changes.compare(recorded(config=changes.relevant(OPTIONS)), "checkpoint-3", None, now) == []
    assert changes.config_hash(OPTIONS) == changes.config_hash({**OPTIONS, "save_steps": 7})


def test_options_that_matter_are_refused_with_a_diff_and_can_be_allowed() -> None:
    then, now = recorded(config=OPTIONS), {**OPTIONS, "learning_rate": 2e-4, "seed": 1, "world_size": 2}
    with pytest.raises(UserError) as caught:
        changes.compare(then, "checkpoint-3", ["seed"], now)
    assert "learning_rate: 0.0001 -> 0.0002" in str(caught.value)
    assert "--allow_config_change learning_rate world_size" in str(caught.value)
    assert "seed" not in str(caught.value)
    told = changes.compare(then, "checkpoint-3", ["seed", "learning_rate", "world_size"], now)
    assert told[0] == "changed by allow_config_change from step 4 on: learning_rate: 0.0001 -> 0.0002"
    assert len(told) == 3


def test_a_misspelt_permission_is_a_mistake() -> None:
    with pytest.raises(UserError, match="did you mean learning_rate"):
        changes.check_keys(["learning_rat"], OPTIONS)


@pytest.fixture
def parts(finished: Finished, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the finished run as a kill in step 5 leaves it, with checkpoint-2 and checkpoint-4."""
    return lambda: finished.cut(tmp_path / "parts")


def test_a_damaged_newest_checkpoint_is_passed_over(finished: Finished, parts, capsys) -> None:
    output = parts()
    damage(output / "checkpoint-4" / "optimizer.pt", "truncated")
    assert run("sft", finished.options(output), "--resume_from_checkpoint", "auto") == 0
    told = capsys.readouterr().out
    assert "skipped checkpoint-4: optimizer.pt has" in told
    assert f"resuming from {output / 'checkpoint-2'}" in told
    assert_equal(finished.output, output, STEPS)
    assert json.loads((output / "run.json").read_text())["resumed_from"] == str(output / "checkpoint-2")


@pytest.mark.faults
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_any_file_of_a_checkpoint(finished: Finished, parts, kind: str, capsys) -> None:
    """Every file in turn: the checkpoint before is taken, and the message names the file."""
    output = parts()
    newest = output / "checkpoint-4"
    whole = newest.with_name("whole")
    shutil.copytree(newest, whole)
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 10
    for name in files:
        damage(newest / name, kind)
        found = find(str(output), "auto")
        assert found.path == str(output / "checkpoint-2"), name
        assert str(name) in found.lines[0]
        assert found.lines[0].startswith("skipped checkpoint-4: ")
        shutil.copyfile(whole / name, newest / name)
    assert find(str(output), "auto").path == str(newest)
    shutil.rmtree(whole)
    damage(newest / "adapter_model.safetensors", kind)
    assert run("sft", finished.options(output), "--resume_from_checkpoint", "auto") == 0
    assert_equal(finished.output, output, STEPS)


def test_two_interruptions_read_as_one_series_in_wandb(
    finished: Finished, parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B, offline, holds what the run's own files hold: no row twice, none left out."""
    output, prompts, on_log = parts(), tmp_path / "prompts.txt", Tracker.on_log
    prompts.write_text("the fox")
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**record, "wandb_id": "earlier"}))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))
    wandb.teardown()  # its settings are read once for a process
    samples = {"sample_prompts": str(prompts), "sample_steps": "1", "sample_max_new_tokens": "2"}
    again = [*finished.options(output, report_to="wandb", **samples), "--resume_from_checkpoint", "auto"]

    def breaks(self, args, state, control, **kwargs) -> None:
        on_log(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise RuntimeError("the node is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "on_log", breaks)
        assert run("sft", again) == 1
    assert run("sft", again) == 0
    wandb.teardown()
    files = sorted(output.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    first, last = map(wandb_file.read, files)
    rows = [row for row in last["history"] if "samples.path" not in row]
    assert [{key: row[key] for key in row if not key.startswith("_")} for row in rows] == [
        {**{key: value for key, value in row.items() if value is not None}, "train/global_step": row["step"]}
        for row in read_rows(output)
    ]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    rounds = [json.loads(line)["step"] for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in last["history"] if "samples.path" in row] == rounds == [5, 6]
    steps = [row["train/global_step"] for row in last["history"]]
    assert steps == sorted(steps)
    assert first["config"]["halfbyte"]["continues_wandb_run"] == "earlier"
    assert last["config"]["halfbyte"]["continues_wandb_run"] == first["id"] != last["id"]
    assert first["group"] == last["group"] == record["run_id"]
    assert first["alerts"] == [("sft failed", "the node is gone")]
    told = json.loads((output / "run.json").read_text())
    assert last["artifacts"]["final"] == sorted(told["files"])
    assert told["wandb_id"] == last["id"]
    assert manifest.read(output / f"checkpoint-{STEPS}").wandb_id == last["id"]


def test_no_checkpoint_yet_starts_over_and_keeps_the_logs(finished: Finished, tmp_path: Path, capsys) -> None:
    output = tmp_path / "run"
    (output / "_pending-checkpoint" / "checkpoint-2").mkdir(parents=True)
    (output / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    (output / "run.json").write_text("{}")
    assert run("sft", finished.options(output), "--resume_from_checkpoint", "auto") == 0
    assert "no checkpoint yet; starting from step 0" in capsys.readouterr().out
    assert (output / "_earlier" / "1" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 9.0}\n'
    assert_equal(finished.output, output, STEPS)


REFUSED = {
    "learning rate": ({"learning_rate": "1e-3"}, "learning_rate: 0.01 -> 0.001"),
    "accumulation": ({"gradient_accumulation_steps": "2"}, "gradient_accumulation_steps: 1 -> 2"),
    "permission": ({"allow_config_change": "learning_rat"}, "did you mean learning_rate"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_changed_option_is_refused(finished: Finished, parts, change: str, capsys) -> None:
    output = parts()
    before = sorted(path.name for path in output.rglob("*"))
    given, told = REFUSED[change]
    assert run("sft", finished.options(output, **given), "--resume_from_checkpoint", "auto") == 2
    assert told in capsys.readouterr().err
    assert sorted(path.name for path in output.rglob("*")) == before


def test_the_save_level_of_the_checkpoint_is_kept(finished: Finished, parts, tmp_path: Path) -> None:
    output = parts()
    newest = output / "checkpoint-4"
    made = manifest.read(newest)
    assert made.decided == {"save_level": 3}
    manifest.write(newest, replace(made, decided={"save_level": 1}))
    found = find(str(output), "auto").manifest
    assert resolve._recorded_level({"memory_budget": "auto"}, found) == 1
    assert resolve._recorded_level({"memory_budget": "min"}, found) is None
    assert run("sft", finished.options(output), "--resume_from_checkpoint", "auto") == 0
    fast = json.loads((output / "run.json").read_text())["fast"]
    assert fast["level"] == fast["memory"]["level"] == 1
    assert fast["memory"]["recorded"] is True
    assert manifest.read(output / "checkpoint-6").decided == {"save_level": 1}
    assert_equal(finished.output, output, STEPS)


def test_changed_rows_are_refused_and_allowed(finished: Finished, parts, tmp_path: Path, capsys) -> None:
    output = parts()
    rows = shutil.copytree(finished.rows, tmp_path / "other")
    lines = (rows / "train.jsonl").read_text().splitlines()
    (rows / "train.jsonl").write_text("\n".join(reversed(lines)))
    changed = options(finished.model, str(rows), output, save_steps="2")
    resumed = ("--resume_from_checkpoint", "auto", "--allow_config_change", "dataset_name")
    assert run("sft", changed, *resumed) == 2
    assert "data: " in capsys.readouterr().err
    assert run("sft", changed, *resumed, "data") == 0
    assert "changed by allow_config_change from step 5 on: data" in capsys.readouterr().out


def test_other_versions_are_said() -> None:
    then = recorded(versions={"torch": "2.11.0", "trl": "1.16.0", "gone": "1"})
    assert changes.other_versions(then, {"torch": "2.11.0", "trl": "1.16.0"}) == []
    told = changes.other_versions(then, {"torch": "2.13.0", "trl": "1.16.0"})
    assert told == ["resume: other versions, so it may not be bit for bit: torch 2.11.0 -> 2.13.0"]
