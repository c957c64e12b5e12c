"""TRL's constructors leave the adapters float32, and the reference a frozen copy of all of them, rows included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from halfbyte import QLoRAPlugin
from tests import tiny

ModelDir = Callable[..., Path]
TOKEN = 7  # one that occurs in the rows


@pytest.fixture(scope="module")
def saved(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that differs from its base in every B and in one embedding row, by values bfloat16 rounds."""
    torch.manual_seed(0)
    model = QLoRAPlugin(dtype="float32").load(str(model_dir("llama")), added_token_ids=[TOKEN])
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return directory


def dpo(adapter: Path, output: Path, **options: Any) -> Trainer:
    args = DPOConfig(
        str(output), use_cpu=True, bf16=False, max_steps=2, per_device_train_batch_size=2, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1, learning_rate=1e-2, **options,
    )  # fmt: skip
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(adapter), fast="none")
    rows = Dataset.from_list(tiny.preferences(8))
    return plugin.trainer(DPOTrainer, args=args, train_dataset=rows, eval_dataset=rows)


def policies(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p for n, p in trainer.model.named_parameters() if "default" in n.split(".")}


def test_the_reference_is_a_frozen_float32_copy_of_all_of_the_adapter(saved: Path, tmp_path: Path) -> None:
    trainer = dpo(saved, tmp_path)
    named, trained = dict(trainer.model.named_parameters()), policies(trainer)
    assert any("trainable_tokens" in name for name in trained)
    for name, policy in trained.items():
        reference = named[".".join("ref" if part == "default" else part for part in name.split("."))]
        assert torch.equal(policy, reference), name
        assert policy.dtype == reference.dtype == torch.float32
        assert policy.requires_grad
        assert not reference.requires_grad
        assert not torch.equal(policy, policy.bfloat16().float()), f"{name} was rounded"


def test_precomputed_references_are_those_of_the_whole_adapter(saved: Path, tmp_path: Path) -> None:
    """They are computed inside the constructor, after TRL rounded the adapter and before it returns."""
    trainer = dpo(saved, tmp_path, precompute_ref_log_probs=True)
    loader = torch.utils.data.DataLoader(
        trainer.train_dataset, batch_size=2, collate_fn=trainer.data_collator
    )
    for batch in loader:
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        assert torch.equal(chosen, batch["ref_chosen_logps"])
        assert torch.equal(rejected, batch["ref_rejected_logps"])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "rewards/margins" in row]
    assert rows[0]["rewards/margins"] == 0
    assert rows[1]["rewards/margins"] != 0


def test_an_evaluation_between_steps_restores_nothing(saved: Path, tmp_path: Path) -> None:
    """A new evaluation set has its references computed by the same method, in the middle of training."""
    trainer = dpo(saved, tmp_path, precompute_ref_log_probs=True)
    trainer.train()
    before = {name: parameter.detach().clone() for name, parameter in policies(trainer).items()}
    trainer.evaluate(
        trainer._prepare_dataset(
            Dataset.from_list(tiny.preferences(4)), trainer.processing_class, trainer.args, "new"
        )
    )
    assert all(torch.equal(parameter, before[name]) for name, parameter in policies(trainer).items())
