"""What the first step shows is said: adapters without a gradient, and layers that ran unfused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
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
from halfbyte import run as running
from halfbyte.errors import Halted, UserError
from halfbyte.recipe import Recipe
from halfbyte.trainer.best_metric import FIGURES
from halfbyte.trainer.first_step import with_gradient
from tests import tiny
from tests.checkpoint.runs import options
from tests.fast import models

ModelDir = Callable[..., Path]
DEAF = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"init_lora_weights": False}, {"r": 2}])
def test_every_adapter_that_is_trained_has_a_gradient(lora: dict[str, Any]) -> None:
    """Also where A has none, as B is zero."""
    model = models.make("llama", **lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and lora.get("init_lora_weights", True):
            torch.nn.init.zeros_(parameter)
    rows = {"input_ids": torch.randint(1, 90, (2, 8))}
    model(**rows, labels=rows["input_ids"]).loss.backward()
    found = with_gradient(model)
    assert DEAF in found
    assert all(found.values())
    model.zero_grad()
    assert not any(with_gradient(model).values())


class Deaf(SFTTrainer):
    """Loses the gradient of one adapter."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if DEAF in name and parameter.grad is not None:
                parameter.grad.zero_()
        return loss


class Dropping(SFTTrainer):
    """Turns dropout inside attention on, which fused layers do not compute."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        for module in self.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        return super().training_step(*args, **kwargs)


class Renamed(SFTTrainer):
    """Has another figure than TRL's."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = super().evaluate(*args, **kwargs)
        return {key: value for key, value in found.items() if key != "eval_entropy"}


def start(trainer: type[Trainer], model: Path, directory: Path, **given: str) -> int:
    rows = tiny.write_rows(directory / "rows", tiny.conversations(12))
    words = options(model, rows, directory / "run", max_steps="2", save_strategy="no", **given)
    return running.main("odd", Recipe(config=SFTConfig, trainer=trainer, summary="s"), words)


@pytest.mark.parametrize("accumulated", ["1", "2"])
def test_an_adapter_without_a_gradient_is_reported_once(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture, accumulated: str
) -> None:
    assert start(Deaf, model_dir("llama"), tmp_path, gradient_accumulation_steps=accumulated) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "got no gradient" in line]
    assert said == [
        f"step 1: 1 adapter of 14 got no gradient, the first on {DEAF}; `lora_exclude_modules` leaves out what the "
        "rows do not train"
    ]


def test_layers_that_ran_unfused_are_reported_after_the_first_step(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert start(Dropping, model_dir("llama"), tmp_path) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "ran unfused" in line]
    assert said == ["step 1: fused layers ran unfused in 2 calls (dropout inside attention)"]


def sft(model: Path, output: Path, **given: Any) -> Trainer:
    args = SFTConfig(
        str(output), use_cpu=True, report_to="none", eval_strategy="steps", eval_steps=1, save_steps=1,
        max_steps=1, disable_tqdm=True, bf16=given.pop("bf16", False), **given,
    )  # fmt: skip
    rows = Dataset.from_list(tiny.texts(4))
    plugin = QLoRAPlugin(dtype="float32")
    return plugin.trainer(SFTTrainer, model=str(model), args=args, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("wanted", ["eval_los", "rewards/accuracies", "eval_eval_loss", "accuracy"])
def test_a_figure_that_no_evaluation_has_is_refused_before_training(
    model_dir: ModelDir, tmp_path: Path, wanted: str
) -> None:
    with pytest.raises(
        UserError, match=f"metric_for_best_model: no evaluation has a figure '{wanted}'.* it has loss"
    ):
        sft(model_dir("llama"), tmp_path, metric_for_best_model=wanted, load_best_model_at_end=True)


def test_the_figures_that_are_known_are_those_that_are_logged(model_dir: ModelDir, tmp_path: Path) -> None:
    made = {
        SFTTrainer: (SFTConfig, tiny.texts),
        DPOTrainer: (DPOConfig, tiny.preferences),
        KTOTrainer: (KTOConfig, tiny.labelled),
        RewardTrainer: (RewardConfig, tiny.preferences),
    }
    for cls, known in FIGURES.items():
        config, rows = made[cls]
        args = config(str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
        data = Dataset.from_list(rows(4))
        plugin = QLoRAPlugin(dtype="float32")
        trainer = plugin.trainer(
            cls, model=str(model_dir("llama")), args=args, train_dataset=data, eval_dataset=data
        )
        found = {key.removeprefix("eval_") for key in trainer.evaluate()}
        assert found - {"model_preparation_time", "epoch"} == set(known) - {"aux_loss"}


def test_a_figure_that_turns_out_missing_ends_the_run_in_a_sentence(
    model_dir: ModelDir, tmp_path: Path
) -> None:
    given = {"eval_strategy": "steps", "eval_steps": "1", "metric_for_best_model": "entropy"}
    with pytest.raises(
        Halted, match="step 1: metric_for_best_model: the evaluation has no figure 'entropy'; it has"
    ):
        start(Renamed, model_dir("llama"), tmp_path, **given)


def test_layers_that_would_never_run_fused_are_not_called_fused(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"attention_dropout": 0.0', '"attention_dropout": 0.1'))
    report = sft(base, tmp_path / "a").report.fusion
    assert report.layers == 0
    assert report.layers_apart == {"dropout inside attention": 2}
    assert "2 layers not fused (dropout inside attention)" in report.line()
    (base / "config.json").write_text(config)
    mixed = sft(base, tmp_path / "b", bf16=True).report.fusion
    assert mixed.layers_apart == {"products in another dtype than the model's torch.float32": 2}
    assert sft(base, tmp_path / "c").report.fusion.layers == 2
