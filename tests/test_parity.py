"""The first ten steps equal plain TRL + PEFT + bitsandbytes in float32: losses and adapter gradients."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin
from tests import plain_trl, tiny
from tests.plain_trl import Steps

STEPS = 10
ROWS = {SFTTrainer: tiny.conversations, DPOTrainer: tiny.preferences, KTOTrainer: tiny.labelled}


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
