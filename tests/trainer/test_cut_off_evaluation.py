"""An evaluation that ends before its last batch leaves nothing to the next one, in a session or over a resume."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from halfbyte import QLoRAPlugin
from halfbyte.trainer import exact_resume
from halfbyte.trainer.stopping import StopTogether
from tests import plain_trl, tiny
from tests.checkpoint.runs import ROWS, SAVED, assert_equal, options, read_rows, run

ModelDir = Callable[..., Path]
# Step 3 evaluates, and is the first half of a row of the log; each step has two micro-batches.
GIVEN = {
    "gradient_accumulation_steps": "2",
    "logging_steps": "2",
    "eval_strategy": "steps",
    "eval_steps": str(SAVED),
    "per_device_eval_batch_size": "2",
}


@pytest.mark.parametrize("recipe", ["sft", "dpo", "kto", "reward"])
def test_a_resume_counts_each_row_of_the_evaluation_once(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    rows = tiny.write_rows(tmp_path / "rows", ROWS[recipe](19), held_out=7)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(recipe, options(model_dir("llama"), rows, whole, **GIVEN)) == 0
    assert [row["step"] for row in read_rows(whole) if "eval_loss" in row] == [3, 6]

    again = options(model_dir("llama"), rows, parts, **GIVEN)
    with monkeypatch.context() as patched:
        _interrupt_after(patched, batches=2)
        assert run(recipe, again) == 130
    counted = _counted(parts)
    assert counted == _counted(whole)
    assert counted["_metrics"]["train"], "half a row of training is carried over"

    assert run(recipe, again, "--resume_from_checkpoint", "auto") == 0
    assert_equal(whole, parts)


def test_a_checkpoint_that_has_sums_of_an_evaluation_is_resumed_without_them(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such checkpoints were saved before: what they have of an evaluation is not restored."""
    rows = tiny.write_rows(tmp_path / "rows", ROWS["sft"](19), held_out=7)
    arguments = options(model_dir("llama"), rows, tmp_path / "run", **GIVEN)
    with monkeypatch.context() as patched:
        _interrupt_after(patched, batches=2)
        patched.setattr(exact_resume, "without_evaluation", lambda value: value)
        assert run("sft", arguments) == 130
    assert _counted(tmp_path / "run")["_metrics"]["eval"]
    restored = []
    evaluation = exact_resume.ExactResume.evaluate

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        restored.append({**self._metrics["eval"], **self._figure_weights["eval"]})
        return evaluation(self, *args, **kwargs)

    monkeypatch.setattr(exact_resume.ExactResume, "evaluate", evaluate)
    assert run("sft", arguments, "--resume_from_checkpoint", "auto") == 0
    assert restored == [{}, {}]


TRAINERS: dict[str, Any] = {
    "sft": (SFTTrainer, SFTConfig, tiny.conversations),
    "dpo": (DPOTrainer, DPOConfig, tiny.preferences),
    "kto": (KTOTrainer, KTOConfig, tiny.labelled),
    "orpo": (ORPOTrainer, ORPOConfig, tiny.preferences),
    "reward": (RewardTrainer, RewardConfig, tiny.preferences),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_evaluation_begins_at_zero(model_dir: ModelDir, tmp_path: Path, kind: str) -> None:
    trainer_cls, config, rows = TRAINERS[kind]
    trainer = QLoRAPlugin(dtype="float32", lora_r=4).trainer(
        trainer_cls,
        model=str(model_dir("llama")),
        args=plain_trl.arguments(config, tmp_path / "run", per_device_eval_batch_size=2),
        train_dataset=Dataset.from_list(rows(4)),
        eval_dataset=Dataset.from_list(rows(9)),
    )
    expected = _figures(trainer.evaluate())
    assert len(expected) > 3
    step, calls = trainer.prediction_step, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return step(*args, **kwargs)

    trainer.prediction_step = broken
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate()
    assert _figures(trainer.evaluate()) == expected
    trainer.predict(trainer.eval_dataset.select(range(3)))  # upstream logs nothing of it
    assert _figures(trainer.evaluate()) == expected


def _interrupt_after(patched: pytest.MonkeyPatch, batches: int) -> None:
    """Send SIGINT in the first evaluation, when ``batches`` of it are done."""
    boundary, done = StopTogether.on_prediction_step, []

    def on_prediction_step(self: Any, *args: Any, **kwargs: Any) -> None:
        done.append(1)
        if len(done) == batches:
            os.kill(os.getpid(), signal.SIGINT)
        boundary(self, *args, **kwargs)

    patched.setattr(StopTogether, "on_prediction_step", on_prediction_step)


def _counted(output: Path) -> dict[str, Any]:
    return json.loads((output / f"checkpoint-{SAVED}" / "progress_0.json").read_text())


def _figures(metrics: dict[str, float]) -> dict[str, float]:
    timed = ("runtime", "per_second", "model_preparation_time")
    return {key: value for key, value in metrics.items() if not any(word in key for word in timed)}
