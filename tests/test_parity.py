"""The first ten steps equal plain TRL + PEFT + bitsandbytes in float32: losses and adapter gradients."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer
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

from halfbyte import QLoRAPlugin
from tests import plain_trl, tiny
from tests.plain_trl import Steps, adapter

__all__ = ["adapter"]

STEPS = 10
ROWS = {
    SFTTrainer: tiny.conversations,
    DPOTrainer: tiny.preferences,
    KTOTrainer: tiny.labelled,
    RewardTrainer: tiny.preferences,
}


@pytest.mark.parametrize("options", [{}, {"center_rewards_coefficient": 0.01}], ids=["", "centered"])
def test_ten_steps_of_a_reward_model_equal_plain_trl(
    model_dir: Callable[..., Path], tmp_path: Path, options: dict
) -> None:
    """The head is a new one, in float32 here and there, and trained with the adapter."""
    rows = [{**row, "margin": n % 3 / 2} for n, row in enumerate(tiny.preferences(48))]
    base, start = model_dir("llama"), tmp_path / "start"
    plugin = QLoRAPlugin(dtype="float32", lora_task_type="SEQ_CLS")
    plain_trl.save_start(plugin.load(str(base)), start)
    model = PeftModel.from_pretrained(plain_trl.scoring_base(base), start, is_trainable=True)

    def args(name: str):
        return plain_trl.arguments(
            RewardConfig, tmp_path / name, max_steps=STEPS, per_device_train_batch_size=2, **options
        )

    theirs = RewardTrainer(
        model=model,
        args=args("theirs"),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    plain_trl.keep_adapter_in_float32(theirs)
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(start))
    ours = plugin.trainer(
        RewardTrainer, model=str(base), args=args("ours"), train_dataset=Dataset.from_list(rows)
    )
    assert ours.report.fusion.layers == 2
    head = "base_model.model.score.modules_to_save.default.weight"
    assert {n: p.dtype for n, p in ours.model.named_parameters() if p.requires_grad and "score" in n} == {
        head: torch.float32
    }
    found = Steps.of(ours)
    assert len(found.losses) == STEPS
    plain_trl.assert_equal(found, Steps.of(theirs))


@pytest.mark.parametrize(
    ("trainer_cls", "config", "options"),
    [
        (SFTTrainer, SFTConfig, {}),
        (SFTTrainer, SFTConfig, {"assistant_only_loss": True}),
        (SFTTrainer, SFTConfig, {"packing": True, "max_length": 64}),
        (DPOTrainer, DPOConfig, {}),
        (KTOTrainer, KTOConfig, {"desirable_weight": 1.5}),
        (KTOTrainer, KTOConfig, {"loss_type": "apo_zero_unpaired"}),
    ],
    ids=["sft", "sft assistant only", "sft packed", "dpo", "kto", "kto without a KL term"],
)
def test_ten_steps_equal_plain_trl(
    model_dir: Callable[..., Path],
    tmp_path: Path,
    adapter: Path,
    trainer_cls: type,
    config: type,
    options: dict,
) -> None:
    rows = Dataset.from_list(ROWS[trainer_cls](48))
    base = model_dir("llama")

    def args(name: str):
        options_ = {"max_steps": STEPS, "per_device_train_batch_size": 2, **options}
        return plain_trl.arguments(config, tmp_path / name, **options_)

    model = PeftModel.from_pretrained(plain_trl.base(base), adapter, is_trainable=True)
    theirs = trainer_cls(
        model=model,
        args=args("theirs"),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    plain_trl.keep_adapter_in_float32(theirs)
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(adapter))
    ours = plugin.trainer(trainer_cls, model=str(base), args=args("ours"), train_dataset=rows)
    found = Steps.of(ours)
    assert len(found.losses) == STEPS
    plain_trl.assert_equal(found, Steps.of(theirs))
