"""Bases with experts for tests: a tiny one of each family, in four bits, in MXFP4, and the same weights kept dense."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from halfbyte.quantization import experts, load_base
from tests import architectures, plain_trl

_MLA = {"head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
# What the tiny configuration of a family requires beyond that of tests.architectures.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "mixtral": {},
    "gpt_oss": {},
    "glm4_moe": {},
    "deepseek_v3": _MLA,
    "granitemoe": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "nemotron_h": {},
    "aria_text": {},
    "qwen3_next": {},
}
MORE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {},
    "qwen3_5_moe_text": {},
    "olmoe": {},
    "deepseek_v2": _MLA,
    "granitemoehybrid": {},
    "granitemoeshared": {},
    "ernie4_5_moe": {},
    "minimax": {},
    "minimax_m2": {},
    "hunyuan_v1_moe": {},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "jamba": {"num_experts": 4, "num_experts_per_tok": 2},
    "dots1": {},
    "flex_olmo": {},
    "afmoe": {},
    "cohere2_moe": {},
    "exaone_moe": {},
    "hy_v3": {},
    "solar_open": {},
}


def load(directory: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The base in ``directory``, in four bits."""
    return load_base(str(directory), quantization=plain_trl.nf4(), dtype=dtype, device=torch.device("cpu"))


def rounded(directory: str | Path, packed: nn.Module) -> Any:
    """The base in ``directory`` with dense weights: those that ``packed`` dequantizes to."""
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    modules = dict(packed.named_modules())
    for name, module in dense.named_modules():
        mine: Any = modules[name]
        if isinstance(mine, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(mine.weight.data, mine.weight.quant_state).float()
            module.weight.data = weight if module.weight.shape == weight.shape else weight.t()
        for stack in experts.names_of(module):
            held = experts.packed(mine, stack)
            assert held is not None, name
            getattr(module, stack).data = held.whole(torch.float32)
    dense.config.use_cache = False
    return dense


def save(directory: Path, family: str) -> str:
    """Write a tiny random base of ``family`` with experts, and return the directory."""
    return architectures.save(directory, family, **{**FAMILIES, **MORE}[family])


def save_mxfp4(directory: Path) -> dict[str, Tensor]:
    """Write a tiny random base as gpt-oss is published, and return its stacks, dequantized.

    Blocks and scales of 32 weights, transposed, beside 16-bit tensors; a stack begins in one file and ends in another.
    """
    architectures.save(directory, "gpt_oss")
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    stacks: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts_, inputs, outputs = tensors.pop(name).shape
        grouped = (experts_, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*grouped, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 122, grouped, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        stacks[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    (directory / "model.safetensors").unlink()
    places = {
        name: f"model-0000{1 + name.endswith('_scales')}-of-00002.safetensors" for name in sorted(tensors)
    }
    for file in set(places.values()):
        held = {name: tensors[name] for name in tensors if places[name] == file}
        save_file(held, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))
    return stacks
