"""Preference runs start at ln 2: from a saved adapter, or with the base as the reference of a fresh one."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from halfbyte import QLoRAPlugin
from tests.adapters.build import dpo

ModelDir = Callable[..., Path]


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.rows.append(dict(logs))


def first_loss(trainer: Trainer) -> float:
    """The loss at step 0, unrounded."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


@pytest.mark.parametrize("by_model_path", [False, True], ids=["adapter_name_or_path", "model path"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dpo_from_an_adapter_starts_at_ln_2(
    sft_adapter: Path, tmp_path: Path, by_model_path: bool, dtype: str
) -> None:
    if by_model_path:
        trainer = dpo(QLoRAPlugin(dtype=dtype), tmp_path, str(sft_adapter))
    else:
        trainer = dpo(QLoRAPlugin(dtype=dtype, adapter_name_or_path=str(sft_adapter)), tmp_path)
    named = dict(trainer.model.named_parameters())
    policies = [n for n in named if ".default." in n]
    assert policies
    for name in policies:
        reference = named[name.replace(".default.", ".ref.")]
        assert torch.equal(named[name], reference)
        assert named[name].dtype == reference.dtype == torch.float32
        assert named[name].requires_grad
        assert not reference.requires_grad
    assert any(named[n].abs().max() > 0 for n in policies if "lora_B" in n), "the SFT adapter is not trivial"
    assert abs(first_loss(trainer) - math.log(2)) < 1e-6


def test_dpo_with_a_fresh_adapter_takes_the_base_as_reference(model_dir: ModelDir, tmp_path: Path) -> None:
    trainer = dpo(QLoRAPlugin(dtype="float32"), tmp_path, str(model_dir("llama")))
    assert trainer.ref_model is None
    assert not any(".ref." in name for name, _ in trainer.model.named_parameters())
    assert abs(first_loss(trainer) - math.log(2)) < 1e-6
    rows = Losses()
    trainer.add_callback(rows)
    trainer.train()
    assert rows.rows[0]["rewards/margins"] == 0
    assert rows.rows[1]["rewards/margins"] != 0
