"""DPO learns what its rejections say, and nothing from rejections that say nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from halfbyte import QLoRAPlugin
from halfbyte.demo import corpus
from tests.demo.conftest import arguments

ROWS, HELD_OUT = 384, 128


def held_out_accuracy(
    base: Path, rows: Callable[..., list[dict[str, Any]]], sides: Any, output: Path
) -> float:
    train, test = sides
    trainer = QLoRAPlugin(dtype="float32").trainer(
        DPOTrainer,
        model=str(base),
        args=arguments(DPOConfig, output, max_steps=24, learning_rate=2e-3),
        train_dataset=Dataset.from_list(rows(train[:ROWS])),
        eval_dataset=Dataset.from_list(rows(test[:HELD_OUT])),
    )
    trainer.train()
    return float(trainer.evaluate()["eval_rewards/accuracies"])


def test_shuffled_words_are_learnt(base: Path, sides: Any, tmp_path: Path) -> None:
    assert held_out_accuracy(base, corpus.preferences, sides, tmp_path) > 0.8


def test_rejections_without_signal_teach_nothing(base: Path, sides: Any, tmp_path: Path) -> None:
    assert 0.4 <= held_out_accuracy(base, corpus.uninformative_preferences, sides, tmp_path) <= 0.6
