"""Multimodal checkpoints: text trains their language model alone, and the adapter fits the whole."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from halfbyte import QLoRAPlugin, multimodal
from tests import architectures

IDS = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])


def whole(base: str, **more: Any) -> PreTrainedModel:
    """The checkpoint as transformers loads it, in the four bits that halfbyte trains on."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.float32, quantization_config=four_bits, **more
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # which would compute in bfloat16 in evaluation
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]


@pytest.mark.parametrize(
    "name", ["mistral3", "gemma3", "qwen2_vl", "qwen3_vl", "glm4v", "llava", "smolvlm", "paligemma"]
)
def test_the_adapter_of_the_language_model_fits_the_whole(tmp_path: Path, name: str) -> None:
    base = architectures.save(tmp_path / "base", name)
    trainer, still = architectures.step(base, tmp_path / "out")
    trainer.save_model()
    assert not still
    parts = multimodal.other_parts(trainer.model.get_base_model())
    assert parts
    assert trainer.report.coverage.not_loaded == tuple(parts)
    assert not any(parameter.is_meta for parameter in trainer.model.parameters())
    served = PeftModel.from_pretrained(whole(base), str(tmp_path / "out"))
    assert logits(trainer.model).allclose(logits(served), atol=1e-5)
    assert not logits(served.get_base_model()).equal(logits(whole(base)))
    again = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(tmp_path / "out")).load(base)
    assert logits(again).equal(logits(trainer.model))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava"])
def test_a_pair_starts_at_ln_2(tmp_path: Path, name: str) -> None:
    base = architectures.save(tmp_path / "base", name)
    assert architectures.dpo_loss(base, tmp_path / "out") == pytest.approx(0.693147, abs=1e-5)
