"""A small model of the same architecture in the place of one without weights: what is asked of it needs a forward."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

# What a configuration calls what may be small: nothing that is asked depends on it.
_SMALL = {
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def with_weights(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """Return ``model``, or, where it is on meta, a small one of its class with random weights and ``attention``."""
    if not model.get_input_embeddings().weight.is_meta:
        return model
    config = copy.deepcopy(model.config)
    for each in {id(config): config, id(text := config.get_text_config()): text}.values():
        _shrink(each)
    with torch.random.fork_rng(devices=[]):
        small: Any = type(model)(config)
    small.set_attn_implementation(attention)
    found: PreTrainedModel = small.float().eval()
    return found


def _shrink(config: Any) -> None:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name, most in _SMALL.items():
        value = getattr(config, name, None)
        if isinstance(value, int):
            setattr(config, name, min(value, most))
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        config.layer_types = kinds[: config.num_hidden_layers]
    for name in _TOKENS:
        setattr(config, name, None)
