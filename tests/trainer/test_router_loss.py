"""The router's load-balancing loss beside the fused step: TRL's value and gradient, on streams without padding."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin
from halfbyte.fast.forest import ROOT, Forest
from halfbyte.fast.router_loss import sequences_through
from tests import plain_trl, tiny

TRAINERS: dict[str, Any] = {
    "sft": (SFTTrainer, SFTConfig, tiny.texts),
    "dpo": (DPOTrainer, DPOConfig, tiny.preferences),
}
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def run(base: Path, output: Path, kind: str, fast: str, **options: Any) -> Any:
    trainer_cls, config, rows = TRAINERS[kind]
    # A weight at which an error of the loss would show.
    given = {"router_aux_loss_coef": 0.5, "max_steps": 2, "optim": "sgd", **options}
    args = plain_trl.arguments(config, output, **given)
    args.learning_rate = 1.0  # plain descent moves every adapter by its gradient
    torch.manual_seed(0)
    trainer = QLoRAPlugin(dtype="float32", fast=fast, lora_r=4, lora_target_parameters=STACKS).trainer(
        trainer_cls,
        model=str(base),
        args=args,
        train_dataset=Dataset.from_list(rows(16)),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", TRAINERS)
def test_loss_figures_and_adapters_are_those_of_padded_batches(
    model_dir: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    base = model_dir("qwen3_moe")
    ours, theirs = (run(base, tmp_path / fast, kind, fast) for fast in ("auto", "none"))
    fusion = ours.report.fusion
    assert (fusion.head, fusion.batches, fusion.trees) == ("on", "on", kind == "dpo")
    for name in ("loss", "aux_loss"):
        found, expected = (
            [row[name] for row in each.state.log_history if name in row] for each in (ours, theirs)
        )
        assert found == pytest.approx(expected, rel=1e-5), name
        assert len(found) == 2
    parameters = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, parameters[name], rtol=1e-4, atol=5e-6)


def test_tokens_weigh_as_many_as_sequences_pass_through_them() -> None:
    forest = Forest.of_lengths([2, 1, 3, 4, 0, 1], [ROOT, 0, 0, ROOT, 3, 3])
    assert sequences_through(forest).tolist() == [[2, 2, 1, 1, 1, 1, 2, 2, 2, 2, 1]]
    assert sequences_through(Forest.of_lengths([2, 3])).tolist() == [[1] * 5]


def test_at_the_first_step_the_loss_of_dpo_is_ln_2_beside_the_routers(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    trainer = run(model_dir("qwen3_moe"), tmp_path, "dpo", "auto", max_steps=1)
    row = trainer.state.log_history[0]
    assert row["loss"] - 0.5 * row["aux_loss"] == pytest.approx(math.log(2), abs=1e-5)
