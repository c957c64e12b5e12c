import json
import re
from pathlib import Path

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback

from halfbyte.tracking import RunRecord, Tracker
from halfbyte.tracking.figures import DEFAULT, Figures
from tests.tracking.conftest import CANARY, TrackedRun


def test_run_json_has_the_keys_of_the_design(tracked: TrackedRun) -> None:
    record = json.loads((tracked.directory / "run.json").read_text())
    assert list(record) == [
        *("status", "recipe", "run_id", "config", "versions", "base", "data", "strategy", "steps"),
        *("total_steps", "tokens_per_second", "peak_memory_bytes", "metrics", "checkpoints", "next"),
        *("figures", "wandb_id", "peak_memory_by_phase"),
    ]
    assert (record["status"], record["recipe"], record["steps"], record["total_steps"]) == (
        *("completed", "sft"),
        *(3, 3),
    )
    assert Figures.from_dict(record["figures"]) == DEFAULT
    assert record["tokens_per_second"] > 0
    assert len(record["peak_memory_bytes"]) == 1
    assert record["peak_memory_bytes"][0] > 1e6
    assert record["checkpoints"] == ["checkpoint-2", "checkpoint-3"]
    assert record["next"] == "halfbyte dpo --adapter_name_or_path out/sft"
    assert record["base"]["revision"] == "0123456789" * 4
    assert record["config"]["learning_rate"] == 2e-4
    assert record["config"]["eos_token"] == "<|im_end|>"


def test_metrics_before_and_after(tracked: TrackedRun) -> None:
    metrics = json.loads((tracked.directory / "run.json").read_text())["metrics"]
    assert metrics["before"]["step"] == 0
    assert metrics["eval"]["step"] == 3
    assert metrics["eval"]["eval_loss"] < metrics["before"]["eval_loss"]
    assert {"loss", "grad_norm", "learning_rate", "train_loss", "train_runtime"} <= set(metrics["train"])


def test_metrics_jsonl_has_every_row(tracked: TrackedRun) -> None:
    rows = [json.loads(line) for line in (tracked.directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 3]
    assert all({"epoch", "time"} <= set(row) for row in rows)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3]
    assert "train_runtime" in rows[-1]
    state = json.loads((tracked.directory / "checkpoint-3" / "trainer_state.json").read_text())
    for row, logged in zip(rows[:4], state["log_history"][:4], strict=True):
        assert {key: row[key] for key in logged} == logged


def test_every_tracker_gets_the_same_rows(tracked: TrackedRun) -> None:
    rows = [json.loads(line) for line in (tracked.directory / "metrics.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in row if key != "time"} for row in rows] == tracked.rows_of_others
    trained = [row for row in rows if "loss" in row]
    assert all(row["tokens_per_second"] > 0 and 0 < row["mfu"] < 1 for row in trained)
    assert not any("mfu" in row for row in rows if row not in trained)


def test_memory_by_phase_is_where_it_rose(tracked: TrackedRun) -> None:
    record = json.loads((tracked.directory / "run.json").read_text())
    peaks = record["peak_memory_by_phase"]
    assert set(peaks) <= {"load", "train", "evaluate", "save"}
    assert min(peaks.values()) > 0
    assert max(peaks.values()) <= record["peak_memory_bytes"][0]
    after = [size for phase, size in peaks.items() if phase != "load"]  # which holds more, for a while
    assert after


def test_plots_and_card_are_written(tracked: TrackedRun) -> None:
    plots = {path.name for path in (tracked.directory / "plots").iterdir()}
    assert plots == {"loss.png", "learning_rate.png", "grad_norm.png", "token_accuracy.png"}
    assert "recipe of halfbyte" in (tracked.directory / "README.md").read_text()


def test_no_secret_is_written_anywhere(tracked: TrackedRun) -> None:
    files = [path for path in tracked.directory.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in tracked.output


def test_upstream_progress_and_wandb_are_gone(tracked: TrackedRun) -> None:
    stock = (PrinterCallback, ProgressCallback, WandbCallback)
    assert [callback for callback in tracked.callbacks if isinstance(callback, stock)] == []


def test_plain_lines_and_summary(tracked: TrackedRun) -> None:
    lines = tracked.output.splitlines()
    line = re.compile(
        r"step 2/3  loss \d\S*  lr \d\.\de-\d\d  grad \S+  token accuracy \S+  \S+ tok/s  mfu \S+%"
    )
    assert any(line.fullmatch(text) for text in lines), tracked.output
    assert any(re.fullmatch(r"step 0/3  eval  loss \S+  token accuracy \S+", text) for text in lines)
    assert any(re.fullmatch(r"eval loss +\d\S+ -> \d\S+", text) for text in lines)
    assert any(re.fullmatch(r"wandb: wandb sync \S+/offline-run-\S+", text) for text in lines)
    assert lines[-1] == "next: halfbyte dpo --adapter_name_or_path out/sft"


def _tracker(directory: Path, main: bool = True) -> Tracker:
    return Tracker(RunRecord(directory, "sft"), main=main, bar=False)


def test_plots_that_fail_are_said_once_and_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("halfbyte.tracking.plots.draw", fail)
    tracker, state = _tracker(tmp_path), TrainerState(global_step=4, max_steps=10)
    tracker.on_step_end(None, state, TrainerControl())
    tracker.on_log(None, state, TrainerControl(), logs={"loss": 1.0})
    tracker.on_save(None, state, TrainerControl())
    tracker.finish("interrupted")
    assert [record.message for record in caplog.records if record.name.startswith("halfbyte")] == [
        "Could not write the plots: RuntimeError: no font"
    ]
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["steps"], record["metrics"]["train"]["loss"]) == ("interrupted", 4, 1.0)


def test_saves_draw_once_a_minute_at_the_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 1000.0
    monkeypatch.setattr("halfbyte.tracking.callback.time.monotonic", lambda: seconds)
    tracker, loss = _tracker(tmp_path), tmp_path / "plots" / "loss.png"
    drawn = []
    for step, passed in enumerate((30, 31, 30, 31), start=1):
        seconds += passed
        state = TrainerState(global_step=step, max_steps=10)
        tracker.on_log(None, state, TrainerControl(), logs={"loss": 1.0 / step})
        tracker.on_save(None, state, TrainerControl())
        drawn.append(loss.exists())
        loss.unlink(missing_ok=True)
    assert drawn == [False, True, False, True]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker, state = _tracker(tmp_path / "out", main=False), TrainerState(global_step=4)
    tracker.on_log(None, state, TrainerControl(), logs={"loss": 1.0})
    tracker.on_save(None, state, TrainerControl())
    tracker.write_card()
    tracker.finish("completed")
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_a_run_that_is_killed_has_the_command_to_go_on_with(tmp_path: Path) -> None:
    tracker = Tracker(RunRecord(tmp_path, "sft"), bar=False, resume_command="resume", again_command="again")
    state, found = TrainerState(global_step=0, max_steps=10), []
    for event in ("on_train_begin", "on_save"):
        getattr(tracker, event)(TrainingArguments(report_to="none", use_cpu=True), state, TrainerControl())
        found.append(json.loads((tmp_path / "run.json").read_text())["next"])
        (tmp_path / "checkpoint-2").mkdir(exist_ok=True)
    assert found == ["again", "resume"]
