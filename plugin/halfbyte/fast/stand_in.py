"""A small model of the same architecture in the place of one without weights: what is asked of it needs a forward."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# What a configuration calls what may be small: nothing that is asked depends on it.
_SMALL = {
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "n_inner": 128,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 2,
}
_DEPTHS = {"num_hidden_layers", "depth", "encoder_layers", "num_layers"}
_SHORT = {
    "sliding_window": 4,
    "max_position_embeddings": 64,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "block_size": 16,
}
# What a configuration calls the heads of a Mamba, their size, their groups, and their width together over the stream's.
_STATES = (
    ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_expand"),
    ("mamba_num_heads", "mamba_head_dim", "n_groups", "expand"),
    ("num_heads", "head_dim", "n_groups", "expand"),
)
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def with_weights(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """Return ``model``, or, where it is on meta, a small one of its class with random weights and ``attention``."""
    if not model.get_input_embeddings().weight.is_meta:
        return model
    config = copy.deepcopy(model.config)
    for each in {id(config): config, id(text := config.get_text_config()): text}.values():
        _shrink(each)
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None and part is not text:
            for depth in _DEPTHS & vars(part).keys():  # of a tower, which is made and left out
                setattr(part, depth, 1)
    config._attn_implementation = "eager"  # what the model has may need a GPU
    with torch.random.fork_rng(devices=[]):
        small: Any = type(model)(config)
    small.set_attn_implementation(attention)
    found: PreTrainedModel = small.float().eval()
    return found


def made(model: PreTrainedModel) -> PreTrainedModel | None:
    """What :func:`with_weights` returns in eager attention, or None where a class takes no small configuration."""
    try:
        with torch.device("cpu"):
            return with_weights(model, "eager")
    except Exception:  # of any architecture
        return None


def of_layers(owner: Any, layers: int, *, narrow: bool = True) -> Any:
    """Return a small model of the class of ``owner`` with its first ``layers``: random, on the CPU, in eager attention.

    ``owner`` is the module that has the layers and the configuration. Sizes of heads stay; a ``narrow`` one has few
    heads and a small stream too, which not every configuration allows.
    """
    cls = next(each for each in type(owner).__mro__ if not each.__module__.startswith("torch."))
    config = copy.deepcopy(owner.config)
    _shrink(config, layers)
    if narrow:
        _narrow(config)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config._attn_implementation = "eager"  # what the model has may need a GPU
        small: Any = cls(config)
        small = small.float().eval().requires_grad_(False)
        _randomize(small)
    return small


def _shrink(config: Any, layers: int = 2) -> None:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    deep = getattr(config, "num_hidden_layers", None)  # none of a multimodal one itself
    for name, most in _SMALL.items():
        value = getattr(config, name, None)
        if isinstance(value, int):
            setattr(config, name, min(value, layers if name == "num_hidden_layers" else most))
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == deep:  # what each layer is
            setattr(config, name, value[: config.num_hidden_layers])
    for name in _TOKENS:
        try:
            setattr(config, name, None)
        except Exception:  # some configurations require a number, and check it as it is set
            setattr(config, name, 0)


def _narrow(config: Any) -> None:
    """Make the stream narrow, of four heads, and windows and chunks short."""
    if hasattr(config, "num_attention_heads"):
        _narrow_attention(config)
    for name, most in _SHORT.items():
        if isinstance(value := getattr(config, name, None), int):
            setattr(config, name, min(value, most))
    for names in _STATES:
        if all(isinstance(getattr(config, name, None), int) for name in names):
            _narrow_states(config, *names)
            break
    _narrow_delta_rule(config)


def _narrow_states(config: Any, heads: str, size: str, groups: str, expand: str) -> None:
    """Give a Mamba as many heads as the narrow stream has room for, in two groups at most."""
    width = 2 * getattr(config, size)
    if not hasattr(config, "num_attention_heads"):
        config.hidden_size = width
    wide = getattr(config, expand) * config.hidden_size
    if wide % width:
        wide = width
    setattr(config, heads, wide // getattr(config, size))
    setattr(config, groups, min(getattr(config, groups), 2))
    if getattr(config, "mamba_d_ssm", None) is not None:
        config.mamba_d_ssm = wide


def _narrow_delta_rule(config: Any) -> None:
    """Leave a delta rule two heads, or two of its keys and as many values for each as it has."""
    if isinstance(getattr(config, "linear_num_heads", None), int):
        config.linear_num_heads = min(config.linear_num_heads, 2)
    keys, values = (getattr(config, f"linear_num_{name}_heads", None) for name in ("key", "value"))
    if isinstance(keys, int) and isinstance(values, int):
        config.linear_num_key_heads = min(keys, 2)
        config.linear_num_value_heads = values // keys * config.linear_num_key_heads


def _narrow_attention(config: Any) -> None:
    heads, hidden = config.num_attention_heads, config.hidden_size
    try:
        shared, own_size = getattr(config, "num_key_value_heads", None), getattr(config, "head_dim", None)
    except Exception:  # transformers refuses what differs by layer: there the heads stay as they are
        config.hidden_size = 64
    else:
        config.num_attention_heads = 4
        if shared is not None:
            config.num_key_value_heads = 4 if shared == heads else min(shared, 2)
        config.hidden_size = 64 if own_size else 4 * (hidden // heads)
    if getattr(config, "word_embed_proj_dim", None) is not None:
        config.word_embed_proj_dim = config.hidden_size
    rotary = getattr(config, "rope_parameters", None)
    if isinstance(rotary, dict) and rotary.get("llama_4_scaling_beta"):
        rotary["original_max_position_embeddings"] = 2


def _randomize(model: nn.Module) -> None:
    """Give every weight a value of its own, large enough for a soft cap to show."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    for buffer in model.buffers():
        if buffer.numel() == 1 and buffer.is_floating_point():
            buffer.fill_(0.7)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):  # what bitsandbytes makes a linear
                linear = nn.Linear(*child.weight.shape)
                linear.weight.copy_(child.weight.t())
                linear.bias.copy_(child.bias)
                module.set_submodule(name, linear.requires_grad_(False))
