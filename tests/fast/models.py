"""Tiny 4-bit models of the Llama family with random adapters, made in memory."""

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DeepseekV2Config, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from halfbyte.fast import layer, reading
from halfbyte.fast.parts import Uncovered
from halfbyte.fast.proof import Proofs

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
# Queries and keys of 24 channels, values of 16; no mixture of experts.
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
}
CONFIGS = {
    "llama": lambda **o: LlamaConfig(**SHAPE, **o),
    "llama_bias": lambda **o: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, **o),
    "mistral": lambda **o: MistralConfig(**{**SHAPE, "sliding_window": None, **o}),
    "qwen2": lambda **o: Qwen2Config(**SHAPE, **o),
    "qwen3": lambda **o: Qwen3Config(**SHAPE, head_dim=24, **o),
    "gemma": lambda **o: GemmaConfig(**{**SHAPE, "num_key_value_heads": 1}, head_dim=24, **o),
    "deepseek": lambda **o: DeepseekV2Config(**{**SHAPE, "num_key_value_heads": 4}, **LATENT, **o),
}


def quantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Put bitsandbytes' NF4 linears in the place of all but the head."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight.data, linear.bias = module.weight.data.t().contiguous(), module.bias
            module = linear
        elif type(module) is not nn.Linear or name in ("lm_head", "output_layer", "embed_out"):
            continue
        packed = bnb.nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None, dtype, True, "nf4"
        )
        packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        packed.bias = module.bias
        packed.support_avx512bf16_for_cpu = False
        model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True


def make(
    arch: str,
    dtype: torch.dtype = torch.float32,
    *,
    config: dict | None = None,
    dense: bool = False,
    **lora,
) -> PeftModel:
    """A training-mode PEFT model whose every parameter is random, norms and biases too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[arch](**(config or {})), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype)
    if not dense:
        quantize(model, dtype)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    randomize(peft_model)
    return peft_model.train()


def randomize(model: PeftModel, seed: int = 1) -> None:
    """Give every adapter weight a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def layers(model: PeftModel) -> nn.ModuleList:
    return model.get_base_model().model.layers


def fuse(model: PeftModel, level: int = 0) -> list[str | None]:
    """Fuse the layers of ``model`` whole; return why each is not fused, None where it is."""
    proofs = Proofs(model.get_base_model())
    return [_fuse(each, proofs, level) for each in proofs.layers]


def _fuse(module: nn.Module, proofs: Proofs, level: int) -> str | None:
    try:
        return layer.fuse(module, reading.read(module, proofs.whole(module)), level=level)
    except Uncovered as reason:
        return str(reason)
