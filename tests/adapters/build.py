"""Trainers over tiny models: two steps by default."""

from pathlib import Path

from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin
from tests import tiny


def arguments(cls: type, output: Path, **options):
    base = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return cls(**{**base, **options})


def sft(plugin: QLoRAPlugin, model: Path, output: Path, **options) -> Trainer:
    return plugin.trainer(
        SFTTrainer,
        model=str(model),
        args=arguments(SFTConfig, output, **options),
        train_dataset=Dataset.from_list(tiny.texts(12)),
    )


def dpo(plugin: QLoRAPlugin, output: Path, model: str | None = None, **options) -> Trainer:
    return plugin.trainer(
        DPOTrainer,
        model=model,
        args=arguments(DPOConfig, output, **options),
        train_dataset=Dataset.from_list(tiny.preferences(8)),
    )
