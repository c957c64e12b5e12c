"""The closing summary says the same figure however a run ended, and suggests what is possible."""

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from halfbyte.errors import Stopped
from halfbyte.tracking import RunRecord, Tracker
from halfbyte.tracking.figures import PREFERENCES
from halfbyte.tracking.summary import figure_rows, show

TIES = {"eval_rewards/accuracies": 0.0, "eval_rewards/chosen": 0.0, "eval_rewards/rejected": 0.0}


def test_the_training_loss_is_the_last_one_however_the_run_ended() -> None:
    logged, closing = {"loss": 1.25}, {"train_loss": 2.5}
    for train in (logged, {**logged, **closing}):
        rows = figure_rows({"train": train, "before": {}, "eval": {}}, PREFERENCES)
        assert rows == [("last train loss", "1.2500")]
    assert figure_rows({"train": closing, "before": {}, "eval": {}}, PREFERENCES) == [
        ("mean train loss", "2.5000")
    ]


def test_ties_before_training_are_called_ties() -> None:
    after = {"eval_rewards/accuracies": 0.75, "eval_rewards/chosen": 0.1, "eval_rewards/rejected": -0.1}
    rows = figure_rows({"train": {}, "before": TIES, "eval": after}, PREFERENCES)
    assert rows == [("eval accuracy", "ties -> 0.7500")]
    rounding = {"before": {"eval_rewards/margins": -1e-9}, "eval": {"eval_rewards/margins": 0.5}}
    assert figure_rows({"train": {}, **rounding}, PREFERENCES) == [("eval margin", "0.0000 -> 0.5000")]


@pytest.fixture
def end(tmp_path: Path) -> Callable[..., str]:
    """``end(error)``: what run.json suggests after a run that ended by ``error``."""

    def run(error: BaseException) -> str:
        tracker = Tracker(
            RunRecord(tmp_path, "sft"), next_command="then", resume_command="resume", again_command="again"
        )
        with pytest.raises(type(error)), tracker:
            raise error
        return json.loads((tmp_path / "run.json").read_text())["next"]

    return run


@pytest.mark.parametrize("error", [RuntimeError("first step"), KeyboardInterrupt(), Stopped(15, "stopped")])
def test_a_resume_is_suggested_only_where_something_was_saved(
    end: Callable[..., str], tmp_path: Path, error: BaseException
) -> None:
    assert end(error) == "again"
    (tmp_path / "checkpoint-2").mkdir()
    assert end(error) == "resume"


LONG = "runs/" + "a-directory-with-a-long-name/" * 3 + "dpo"
LAST = {f"eval_{figure.key}": 0.5 for figure in PREFERENCES.compared}


@pytest.mark.parametrize("height", [24, 60])
def test_the_summary_fits_the_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, height: int) -> None:
    """With the commands to copy, which wrap; what gives way is named, and there on a higher screen."""
    console = Console(width=80, height=height, record=True, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr("halfbyte.tracking.summary.Console", lambda: console)
    monkeypatch.setattr("halfbyte.tracking.summary.say", lambda line: console.print(line, soft_wrap=True))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    record = RunRecord(tmp_path, "dpo")
    record.update(
        **{"status": "completed", "steps": 500, "total_steps": 500, "best_checkpoint": "checkpoint-450"},
        **{"tokens_per_second": 1e4, "peak_memory_bytes": [2**34] * 8, "config": {"use_peft": True}},
        memory={"measured": [2**33, 2**32], "predicted": {"total": 2**31}},
        metrics={"train": {"loss": 1.0}, "before": TIES, "eval": LAST},
        next=f"halfbyte dpo --config {LONG}.yaml --output_dir {LONG} "
        + "--some_long_option with_a_value " * 8,
    )
    plots = [Path(LONG) / "plots" / "loss.png"]
    show(
        record.as_dict(),
        Path(LONG),
        PREFERENCES,
        plots,
        f"wandb sync {LONG}/wandb/offline-run-20260101_000000-abcd",
    )
    lines = console.export_text().splitlines()
    text = " ".join(" ".join(lines).split())
    assert all(
        part in text for part in ("status completed", "steps 500 of 500", "last train loss 1.0000", "next: ")
    )
    assert (
        sum(max(1, math.ceil(len(line.rstrip()) / 80)) for line in lines) < height
    )  # a line is for the prompt
    assert "eval margin 0.5000" in text
    assert ("no room speed, peak memory, plots" in text) is (height == 24)
    assert ("speed 10k tokens/s" in text) is (height > 24)
    held = "peak memory 16.00 GiB, the most of 8 ranks; 8.00 GiB for training, 2.00 GiB planned"
    assert (held in text) is (height > 24)


def test_plots_name_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    monkeypatch.setattr(
        "halfbyte.tracking.plots.draw", lambda rows, place, title, *_, **__: titles.append(title)
    )
    (tmp_path / "monday").mkdir()
    Tracker(RunRecord(tmp_path / "monday", "dpo")).finish("completed")
    assert titles[-1] == "dpo, monday"
