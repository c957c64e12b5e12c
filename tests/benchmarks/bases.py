"""Bases of published shapes in random NF4 weights: nothing is downloaded, and no 16-bit model is ever held."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.quantizers import AutoHfQuantizer

from tests.benchmarks import workload

_DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense decoder; ``config`` is the configuration class of its family."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    config: type[PreTrainedConfig] = LlamaConfig


LLAMA_8B = Shape(4096, 32, 14336, 32, 8, 128_256)
LLAMA_70B = Shape(8192, 80, 28672, 64, 8, 128_256)
QWEN_32B = Shape(5120, 64, 27648, 40, 8, 152_064, Qwen2Config)


@contextmanager
def base(shape: Shape, length: int) -> Iterator[Path]:
    """A directory that loads as a base of ``shape`` for rows of ``length`` tokens, here and now only.

    It holds a configuration and a tokenizer. What reads the weights, ``AutoModelForCausalLM.from_pretrained``,
    makes them instead, so that the plugin and plain TRL load it as they load any checkpoint.
    """
    config = shape.config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        # What is planned for, where the training arguments set no length.
        max_position_embeddings=length,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=3,
    )
    with (
        tempfile.TemporaryDirectory() as directory,
        patch.object(AutoModelForCausalLM, "from_pretrained", _make),
    ):
        config.save_pretrained(directory)
        workload.tokenizer(shape.vocabulary).save_pretrained(directory)
        yield Path(directory)


def _make(
    path: str | Path, *, quantization_config: BitsAndBytesConfig, dtype: torch.dtype, **_: Any
) -> PreTrainedModel:
    """What ``from_pretrained`` returns: the same bytes at every call on one device."""
    quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    quantizer.preprocess_model(model, device_map=None)
    _fill(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model.eval()


def _fill(model: PreTrainedModel, device: torch.device) -> None:
    """Take ``model`` from the meta device to ``device``, one weight after the other, each packed at once."""
    generator = torch.Generator(device).manual_seed(0)
    for name, module in list(model.named_modules()):
        if next(module.buffers(recurse=False), None) is not None:  # rotary frequencies, made by their module
            model.set_submodule(name, type(module)(model.config).to(device))
        for leaf, empty in list(module.named_parameters(recurse=False)):
            value = torch.empty(empty.shape, dtype=empty.dtype, device=device)
            if value.dim() == 1 and leaf == "weight":
                value.fill_(1.0)  # a norm's
            else:
                value.normal_(std=_DEVIATION, generator=generator)
            if isinstance(empty, bnb.nn.Params4bit):
                weight = bnb.nn.Params4bit(value, **vars(empty)).to(device)
            else:
                weight = nn.Parameter(value, requires_grad=False)
            setattr(module, leaf, weight)
