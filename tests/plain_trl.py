"""Plain TRL, PEFT and bitsandbytes: what halfbyte is held against, and what of its steps is compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

from halfbyte import QLoRAPlugin


def nf4(dtype: torch.dtype = torch.float32, **options: Any) -> BitsAndBytesConfig:
    """NF4 with double quantization, computing in ``dtype``, with other ``options`` or none."""
    settings = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    return BitsAndBytesConfig(load_in_4bit=True, **{**settings, **options})


def not_repacked(model: PreTrainedModel) -> PreTrainedModel:
    """Have ``model`` compute in evaluation as in training, and return it.

    On a CPU with AVX512-BF16 bitsandbytes would repack its weights in evaluation, and compute in bfloat16.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def base(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in ``path`` in NF4 with double quantization, computing in ``dtype``."""
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=nf4(dtype), dtype=dtype)


def scoring_base(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in ``path`` with a new head of one output, which is not quantized."""
    quantization = nf4(dtype, llm_int8_skip_modules=["score"])
    return AutoModelForSequenceClassification.from_pretrained(
        path, quantization_config=quantization, dtype=dtype, num_labels=1
    )


def arguments(cls: type, output: Path, **options: Any) -> Any:
    """Arguments of class ``cls`` under which a float32 run on the CPU can be compared step by step."""
    return cls(
        output_dir=str(output),
        logging_steps=1,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **{
            "use_cpu": True,
            "optim": "adamw_torch",
            "bf16": False,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            **options,
        },
    )


def save_start(model: PeftModel, output: Path) -> Path:
    """Save ``model`` with an adapter that is not trivial, of values that bfloat16 holds: TRL rounds it to those."""
    generator = torch.Generator().manual_seed(0)  # loading draws from the global one, more or less
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            value = torch.randn(parameter.shape, generator=generator)
            parameter.data = value.mul_(0.02 if "lora_B" in name else 0.1).bfloat16().float()
    model.save_pretrained(output)
    return output


@pytest.fixture(scope="module")
def adapter(model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The start of both, and the reference of both."""
    model = QLoRAPlugin(dtype="float32").load(str(model_dir("llama")))
    return save_start(model, tmp_path_factory.mktemp("adapter"))


def keep_adapter_in_float32(trainer: Trainer) -> None:
    """Undo TRL's cast of a quantized model's adapter to bfloat16, which is exact for values bfloat16 holds."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class Steps(TrainerCallback):
    """The loss and the adapter gradients of every step; ``silent`` names parameters that ever had none."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[torch.Tensor] = []
        self.silent: set[str] = set()

    @classmethod
    def of(cls, trainer: Trainer) -> "Steps":
        """Train ``trainer`` and return what its steps were."""
        steps = cls()
        trainer.add_callback(steps)
        trainer.train()
        return steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        named = sorted((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)
        self.gradients.append(torch.cat([gradient.flatten() for _, gradient in named]))
        self.silent |= {name for name, gradient in named if not gradient.any()}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def assert_equal(ours: Steps, theirs: Steps, *, losses: float = 1e-5, gradients: float = 1e-5) -> None:
    assert len(ours.losses) == len(theirs.losses) == len(theirs.gradients) > 0
    for a, b in zip(ours.losses, theirs.losses, strict=True):
        assert abs(a - b) <= losses * max(1.0, abs(b))
    assert not ours.silent
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        assert (a - b).norm() <= gradients * b.norm()
