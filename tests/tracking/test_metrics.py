import json
import math
from pathlib import Path

import pytest

from halfbyte.tracking import metrics
from halfbyte.tracking.metrics import MetricsLog, Throughput
from halfbyte.tracking.rows import read_rows


def test_rows_are_on_disk_as_they_are_logged_and_valid_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "out" / "metrics.jsonl")
    assert not log.path.parent.exists()
    log.append({"loss": math.nan, "grad_norm": 1.0}, step=1, epoch=0.5)
    (row,) = [json.loads(line, parse_constant=pytest.fail) for line in log.path.read_text().splitlines()]
    assert (row["step"], row["epoch"], row["loss"], row["grad_norm"]) == (1, 0.5, None, 1.0)


def test_a_resumed_run_appends_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval_loss": 3.0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    log = MetricsLog(path)
    log.append({"loss": 1.5}, step=2, epoch=1.0)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2]
    assert log.summary()["before"] == {"step": 0, "eval_loss": 3.0}
    assert log.summary()["train"]["loss"] == 1.5


def test_summary_merges_the_data_sets_of_one_evaluation() -> None:
    log = MetricsLog(Path("unused"))
    log.rows[:] = [
        {"step": 5, "eval_a_loss": 3.0},
        {"step": 10, "loss": 2.0},
        {"step": 10, "eval_a_loss": 1.0},
        {"step": 10, "eval_b_loss": 2.0},
        {"step": 10, "train_runtime": 9.0, "train_loss": 2.5},
    ]
    assert log.summary() == {
        "train": {"step": 10, "loss": 2.0, "train_runtime": 9.0, "train_loss": 2.5},
        "eval": {"step": 10, "eval_a_loss": 1.0, "eval_b_loss": 2.0},
        "before": {},
    }


def test_summary_has_the_figures_of_the_step_that_is_kept() -> None:
    log = MetricsLog(Path("unused"))
    log.rows[:] = [{"step": step, "eval_loss": loss} for step, loss in ((0, 4.0), (5, 1.0), (10, 2.0))]
    assert log.summary()["eval"] == {"step": 10, "eval_loss": 2.0}
    assert log.summary(5) == {
        "train": {}, "eval": {"step": 5, "eval_loss": 1.0}, "before": {"step": 0, "eval_loss": 4.0}
    }  # fmt: skip


def test_throughput_leaves_evaluation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    clock = Throughput()
    now = 2.0
    clock.step()
    assert clock.count(100) == 50.0
    now = 10.0  # an evaluation
    clock.resume()
    now = 11.0
    clock.step()
    assert clock.count(200) == 100.0
    assert clock.rate == pytest.approx(200 / 3)
