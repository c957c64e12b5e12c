"""KTO and a reward model learn what rows say, and nothing from rows that say nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from halfbyte import QLoRAPlugin
from halfbyte.demo import corpus
from tests.demo.conftest import Pairs, arguments

ROWS, HELD_OUT = 768, 128
Sides = tuple[Pairs, Pairs]
pytestmark = pytest.mark.faults


def kto(base: Path, preferences: Callable[..., list[dict[str, Any]]], sides: Sides, output: Path) -> Trainer:
    """A trainer over labelled sides of pairs, and over both sides of held-out ones; trained."""
    train, test = sides
    pairs = preferences(test[:HELD_OUT])
    both = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    trainer = QLoRAPlugin(dtype="float32").trainer(
        KTOTrainer,
        model=str(base),
        args=arguments(KTOConfig, output, max_steps=48, learning_rate=5e-3),
        train_dataset=Dataset.from_list(corpus.labelled(preferences(train[:ROWS]))),
        eval_dataset=Dataset.from_list(both),
    )
    trainer.train()
    return trainer


@torch.no_grad()
def accuracy(trainer: Any) -> float:
    """The share of held-out pairs whose wanted side has the higher implicit reward."""
    rewards = []
    trainer.model.eval()
    loader = DataLoader(trainer.eval_dataset, batch_size=32, collate_fn=trainer.data_collator)
    for batch in loader:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = trainer.model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(-1)
        rewards.append(found - trainer.compute_ref_log_probs(trainer.model, batch)[0])
    wanted, unwanted = torch.cat(rewards).view(-1, 2).unbind(1)
    return float((wanted > unwanted).float().mean())


def test_kto_learns_from_labels(base: Path, sides: Sides, tmp_path: Path) -> None:
    trainer = kto(base, corpus.preferences, sides, tmp_path)
    assert accuracy(trainer) > 0.8
    assert trainer.evaluate()["eval_rewards/margins"] > 1


def test_kto_learns_nothing_from_labels_without_signal(base: Path, sides: Sides, tmp_path: Path) -> None:
    trainer = kto(base, corpus.uninformative_preferences, sides, tmp_path)
    assert 0.4 <= accuracy(trainer) <= 0.6
    assert abs(trainer.evaluate()["eval_rewards/margins"]) < 0.3


def reward_accuracy(
    base: Path, preferences: Callable[..., list[dict[str, Any]]], sides: Sides, output: Path
) -> float:
    train, test = sides
    trainer = QLoRAPlugin(dtype="float32").trainer(
        RewardTrainer,
        model=str(base),
        args=arguments(RewardConfig, output, max_steps=60, learning_rate=5e-3),
        train_dataset=Dataset.from_list(preferences(train[:ROWS])),
        eval_dataset=Dataset.from_list(preferences(test[:HELD_OUT])),
    )
    trainer.train()
    return float(trainer.evaluate()["eval_accuracy"])


def test_a_reward_model_tells_words_in_order_from_shuffled_ones(
    base: Path, sides: Sides, tmp_path: Path
) -> None:
    assert reward_accuracy(base, corpus.preferences, sides, tmp_path) > 0.8


def test_a_reward_model_learns_nothing_from_a_coin(base: Path, sides: Sides, tmp_path: Path) -> None:
    assert 0.4 <= reward_accuracy(base, corpus.uninformative_preferences, sides, tmp_path) <= 0.6
