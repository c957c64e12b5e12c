"""The closing summary says the same figure however a run ended, and suggests what is possible."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.errors import Stopped
from halfbyte.tracking import RunRecord, Tracker
from halfbyte.tracking.figures import PREFERENCES
from halfbyte.tracking.summary import figure_rows

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


def test_plots_name_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    monkeypatch.setattr(
        "halfbyte.tracking.plots.draw", lambda rows, place, title, *_, **__: titles.append(title)
    )
    (tmp_path / "monday").mkdir()
    Tracker(RunRecord(tmp_path / "monday", "dpo")).finish("completed")
    assert titles[-1] == "dpo, monday"
