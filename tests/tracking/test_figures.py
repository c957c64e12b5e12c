"""A recipe decides what its log lines, plots, card and closing summary show."""

from pathlib import Path

import pytest

from halfbyte.tracking import RunRecord, Tracker
from halfbyte.tracking.card import model_card
from halfbyte.tracking.figures import (
    DEFAULT,
    GRAD_NORM,
    LANGUAGE_MODELING,
    LOSS,
    LOSS_PLOT,
    PREFERENCES,
    Figure,
    Figures,
    Plot,
)
from halfbyte.tracking.plots import draw
from halfbyte.tracking.progress import figures

PAIRS = {
    "step": 1,
    "loss": 0.5,
    "mean_token_accuracy": 0.25,
    "rewards/accuracies": 0.75,
    "rewards/margins": 0.1,
}
OWN = Figures(
    (LOSS, GRAD_NORM, Figure("score", "score", ".2f", logged=False, compared=True)),
    (LOSS_PLOT, Plot("score", "Score", "points", ("score",))),
    settings=("temperature",),
)


def test_preferences_show_the_accuracy_of_pairs_and_not_of_tokens() -> None:
    assert figures(PAIRS, shown=PREFERENCES) == "loss 0.5  accuracy 0.750  margin 0.1"
    assert figures(PAIRS, shown=LANGUAGE_MODELING) == "loss 0.5  token accuracy 0.250"
    assert figures(PAIRS, shown=DEFAULT) == "loss 0.5  token accuracy 0.250  accuracy 0.750  margin 0.1"


def test_a_set_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures({"loss": 1.0, "score": 3.0, "grad_norm": 2.0}, shown=OWN) == "loss 1  grad 2"
    tracker = Tracker(RunRecord(tmp_path, "own"), bar=False, figures=OWN)
    tracker.record.update(
        config={"temperature": 0.7, "beta": 0.1, "max_length": 64},
        steps=2,
    )
    for logs in ({"eval_loss": 2.0, "eval_score": 1.0}, {"loss": 1.0}, {"eval_loss": 1.0, "eval_score": 4.0}):
        tracker.metrics.append(logs, 0 if "eval_loss" in logs and not tracker.metrics.rows else 2, 1.0)
    tracker.finish("completed")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "eval loss 2.0000 -> 1.0000" in lines
    assert "eval score 1.0000 -> 4.0000" in lines
    card = (tmp_path / "README.md").read_text()
    assert "| max_length | 64 |\n| temperature | 0.7 |" in card
    assert "beta" not in card
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"loss.png", "score.png"}


def test_the_card_loads_what_the_task_says(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run", "rm")
    record.update(
        config={"lora_task_type": "SEQ_CLS", "use_peft": True, "model_name_or_path": "a/b"},
        files={"adapter_model.safetensors": {}},
    )
    card = model_card(record)
    assert 'AutoModelForSequenceClassification.from_pretrained("a/b", ' in card
    compile(card.split("```python\n")[1].split("```")[0], "README.md", "exec")


def test_a_figure_that_training_logs_is_no_data_set(tmp_path: Path) -> None:
    rows = [{"step": 1, "reward": 1.0, "mean_reward": 2.0}, {"step": 1, "eval_mean_reward": 3.0}]
    drawn: dict = {}
    draw(rows, tmp_path, "rm", drawn)
    assert drawn == {"reward": {("reward", "train"): [(1, 1.0)]}}
