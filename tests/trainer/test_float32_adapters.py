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
        torch.testing.assert_close(chosen, batch["ref_chosen_logps"], rtol=1e-6, atol=0)
        torch.testing.assert_close(rejected, batch["ref_rejected_logps"], rtol=1e-6, atol=0)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "rewards/margins" in row]
    assert abs(rows[0]["rewards/margins"]) < 1e-6
    assert abs(rows[1]["rewards/margins"]) > 1e-6


class Casting(DPOTrainer):
    """Casts the model before every step, as TRL's online trainers do to generate (trainer/grpo_trainer.py:1798)."""

    casts = True

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.casts:
            self.accelerator.unwrap_model(self.model).to(torch.bfloat16)
        return super().training_step(*args, **kwargs)


class NotCasting(Casting):
    casts = False


def test_a_cast_of_the_model_leaves_the_adapters_alone(saved: Path, tmp_path: Path) -> None:
    """Policy and reference, bit for bit: the base is in bfloat16 already, so that the cast changes nothing."""
    ended = []
    for trainer_cls in (Casting, NotCasting):
        args = DPOConfig(
            str(tmp_path), use_cpu=True, bf16=True, max_steps=2, per_device_train_batch_size=2, report_to="none",
            save_strategy="no", disable_tqdm=True, learning_rate=1e-4,
        )  # fmt: skip
        plugin = QLoRAPlugin(dtype="bfloat16", adapter_name_or_path=str(saved))
        rows = Dataset.from_list(tiny.preferences(8))
        trainer = plugin.trainer(trainer_cls, args=args, train_dataset=rows)
        trainer.train()
        parts = {n: p for n, p in trainer.model.named_parameters() if {"default", "ref"} & set(n.split("."))}
        assert {n: p.dtype for n, p in parts.items() if p.dtype != torch.float32} == {}
        ended.append(parts)
    assert all(torch.equal(parameter, ended[1][name]) for name, parameter in ended[0].items())


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
