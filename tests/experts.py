"""Bases with experts for tests: a tiny one of each family, in four bits, and the same weights kept dense."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

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
