"""The first ten steps equal plain TRL + PEFT + bitsandbytes in float32: losses and adapter gradients."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin
from tests import tiny

STEPS = 10
ROWS = {SFTTrainer: tiny.conversations, DPOTrainer: tiny.preferences}


class Steps(TrainerCallback):
    """The loss and the adapter gradients of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        named = sorted((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)
        self.gradients.append(torch.cat([gradient.flatten() for _, gradient in named]))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def arguments(cls: type, output: Path, **options):
    return cls(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        optim="adamw_torch",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )


@pytest.fixture(scope="module")
def adapter(model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is not trivial, with values that bfloat16 holds exactly (TRL rounds it to bfloat16)."""
    output = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = QLoRAPlugin(dtype="float32").load(str(model_dir("llama")))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
            parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(output)
    return output


def plain_trl(trainer_cls: type, base: Path, adapter: Path, args, rows: Dataset) -> Trainer:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = trainer_cls(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


@pytest.mark.parametrize(
    ("trainer_cls", "config", "options"),
    [
        (SFTTrainer, SFTConfig, {}),
        (SFTTrainer, SFTConfig, {"assistant_only_loss": True}),
        (SFTTrainer, SFTConfig, {"packing": True, "max_length": 64}),
        (DPOTrainer, DPOConfig, {}),
    ],
    ids=["sft", "sft assistant only", "sft packed", "dpo"],
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
    runs = []
    for ours in (False, True):
        args = arguments(config, tmp_path / f"{ours}", **options)
        if ours:
            plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(adapter))
            trainer = plugin.trainer(
                trainer_cls, model=str(model_dir("llama")), args=args, train_dataset=rows
            )
        else:
            trainer = plain_trl(trainer_cls, model_dir("llama"), adapter, args, rows)
        steps = Steps()
        trainer.add_callback(steps)
        trainer.train()
        runs.append(steps)
    plain, ours = runs
    assert len(plain.losses) == len(ours.losses) == STEPS
    for a, b in zip(plain.losses, ours.losses, strict=True):
        assert abs(a - b) <= 1e-5
    for a, b in zip(plain.gradients, ours.gradients, strict=True):
        assert a.norm() > 0
        assert (a - b).norm() / a.norm() <= 1e-5
