"""ORPO and SimPO learn what their rejections say, and nothing from rejections that say nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from halfbyte import QLoRAPlugin
from halfbyte.demo import corpus
from tests.demo.conftest import arguments
from tests.demo.test_control import HELD_OUT, ROWS

pytestmark = pytest.mark.faults

STEPS = 60
CLASSES = {
    "orpo": (ORPOTrainer, ORPOConfig, {"beta": 1.0}),
    "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}),
    "cpo": (CPOTrainer, CPOConfig, {}),
}


def reversed_preferences(pairs: list[corpus.Pair]) -> list[dict[str, Any]]:
    """Words in disorder are preferred: without a reference the base itself prefers order, trained or not."""
    return [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in corpus.preferences(pairs)]


def evaluations(
    recipe: str, base: Path, rows: Callable[..., list[dict[str, Any]]], sides: Any, output: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Of held-out pairs, before and after training."""
    (trained, held_out), (trainer_cls, config, given) = sides, CLASSES[recipe]
    trainer = QLoRAPlugin(dtype="float32").trainer(
        trainer_cls,
        model=str(base),
        args=arguments(config, output, max_steps=STEPS, learning_rate=2e-3, **given),
        train_dataset=Dataset.from_list(rows(trained[:ROWS])),
        eval_dataset=Dataset.from_list(rows(held_out[:HELD_OUT])),
    )
    before = trainer.evaluate()
    trainer.train()
    return before, trainer.evaluate()


ACCURACY, MARGIN = "eval_rewards/accuracies", "eval_rewards/margins"


@pytest.mark.parametrize("recipe", CLASSES)
def test_shuffled_words_are_rejected(recipe: str, base: Path, sides: Any, tmp_path: Path) -> None:
    before, after = evaluations(recipe, base, corpus.preferences, sides, tmp_path)
    assert after[ACCURACY] > 0.8
    assert after[MARGIN] > before[MARGIN]


@pytest.mark.parametrize("recipe", CLASSES)
def test_the_opposite_is_learnt_too(recipe: str, base: Path, sides: Any, tmp_path: Path) -> None:
    before, after = evaluations(recipe, base, reversed_preferences, sides, tmp_path)
    assert before[ACCURACY] < 0.2
    assert after[ACCURACY] > 0.8


@pytest.mark.parametrize("recipe", CLASSES)
def test_rejections_without_signal_teach_nothing(recipe: str, base: Path, sides: Any, tmp_path: Path) -> None:
    _, after = evaluations(recipe, base, corpus.uninformative_preferences, sides, tmp_path)
    assert 0.4 <= after[ACCURACY] <= 0.6
