"""DPO trainers whose reference is computed ahead, and the forwards that it took: fixtures to import."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from halfbyte import QLoRAPlugin
from halfbyte.trainer import reference_pass, reference_shard
from tests import tiny

ModelDir = Callable[..., Path]
PAIRS = tiny.preferences(12)
LN2 = math.log(2)


@dataclass
class Passes:
    """Forwards of the reference, by the pairs of each."""

    pairs: list[int]

    def taken(self) -> int:
        """The pairs computed since the last call."""
        taken = sum(self.pairs)
        self.pairs.clear()
        return taken


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "halfbyte" / "references"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    found = Passes([])
    stock = reference_pass._forward

    def counted(trainer: Any, model: Any, dataset: Any, rows: np.ndarray) -> Any:
        found.pairs.append(len(rows))
        return stock(trainer, model, dataset, rows)

    monkeypatch.setattr(reference_pass, "_forward", counted)
    return found


@pytest.fixture
def dpo(model_dir: ModelDir, tmp_path: Path) -> Callable[..., Trainer]:
    """``dpo(lora_r=8, beta=0.2)``: a trainer over the tiny base, its reference computed ahead."""

    def build(
        rows: Any = PAIRS,
        dtype: str = "float32",
        config: type = DPOConfig,
        evaluated: Any = None,
        **options: Any,
    ) -> Trainer:
        ours = {key: options.pop(key) for key in ("lora_r", "fast", "adapter_name_or_path") if key in options}
        args = config(
            str(tmp_path / "run"), use_cpu=True, bf16=dtype == "bfloat16", report_to="none", save_strategy="no",
            **{"disable_tqdm": True, "max_steps": 1, "per_device_train_batch_size": 3, "max_grad_norm": 0.0,
               "precompute_ref_log_probs": True, "logging_steps": 1, **options},
        )  # fmt: skip
        model = None if "adapter_name_or_path" in ours else str(model_dir("llama"))
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return QLoRAPlugin(dtype=dtype, **ours).trainer(
            DPOTrainer, model=model, args=args, train_dataset=rows, eval_dataset=evaluated
        )

    return build


def columns(dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found = dataset.with_format("torch")
    return found["ref_chosen_logps"][:], found["ref_rejected_logps"][:]


def assert_live(trainer: Trainer, dataset: Any, within: float = 1e-6) -> None:
    """The columns are what TRL computes beside the policy, in batches of another size and order."""
    chosen, rejected = columns(dataset)
    for start in range(0, len(dataset), 5):
        batch = trainer.data_collator([dataset[i] for i in range(start, min(start + 5, len(dataset)))])
        live = trainer.compute_ref_log_probs(trainer.model, batch)
        for found, expected in zip((chosen, rejected), live, strict=True):
            torch.testing.assert_close(found[start : start + 5], expected, rtol=within, atol=0)


def first_loss(trainer: Trainer) -> float:
    trainer.train()
    return float(next(row["loss"] for row in trainer.state.log_history if "loss" in row))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four pairs."""
    monkeypatch.setattr(reference_shard, "PAIRS", 4)
