"""A model without weights, on meta, its linear layers as quantization makes them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_utils import set_quantized_state
from transformers.quantizers import AutoHfQuantizer

from halfbyte import multimodal
from halfbyte.quantization.quantizer import registered
from halfbyte.task import Task

# Linear layers of a few weights that a model reads itself, not by a product: packed bytes are no numbers to it.
_READ_AS_NUMBERS = {"gemma3n_text": ("prediction_coefs", "correction_coefs")}


def without_weights(
    name_or_path: str | Path,
    *,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    task: Task,
    entire: bool = False,
    **origin: Any,
) -> PreTrainedModel:
    """Return the model that ``name_or_path`` configures, on meta, its linear layers as ``quantization`` makes them."""
    config = transformers.AutoConfig.from_pretrained(name_or_path, **origin)
    if isinstance(own := getattr(config, "quantization_config", None), dict):
        del config.quantization_config
    if own is not None and own.get("quant_method") == "bitsandbytes":
        quantization = BitsAndBytesConfig.from_dict(own)
    elif quantization is not None:
        quantization = selective(quantization, config, task)
    for name, value in task.model_kwargs.items():
        setattr(config, name, value)
    auto = multimodal.model_class(config, task, entire=entire)
    with torch.device("meta"), set_quantized_state():  # under ZeRO-3 nothing of it is partitioned
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, **_of_code(origin))
    if quantization is not None:
        with registered():
            quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
        config.quantization_config = quantizer.quantization_config
        model.hf_quantizer = quantizer
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = (
            quantization.load_in_4bit,
            quantization.load_in_8bit,
        )
    return model


@contextmanager
def shown_dense(model: nn.Module) -> Iterator[None]:
    """Have the 4-bit weights of a ``model`` on meta be plain parameters of their shape in this block.

    They have no bytes to dequantize, which PEFT does for DoRA's magnitudes.
    """
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    packed = [linear.weight for linear in linears]
    for linear, weight in zip(linears, packed, strict=True):
        plain = nn.Parameter(torch.empty_like(weight.data), requires_grad=False)
        vars(plain).update(vars(weight))
        linear.weight = plain
    try:
        yield
    finally:
        for linear, weight in zip(linears, packed, strict=True):
            linear.weight = weight


def _of_code(origin: dict[str, Any]) -> dict[str, Any]:
    """What of ``origin`` a model's class takes beside its configuration, which the revision has decided."""
    return {name: value for name, value in origin.items() if name != "revision"}


def selective(quantization: BitsAndBytesConfig, config: Any, task: Task) -> BitsAndBytesConfig:
    """``quantization`` without a new head, which 4 bits would freeze, what a model reads as numbers, and towers."""
    kept = [
        *_READ_AS_NUMBERS.get(config.get_text_config().model_type, ()),
        *multimodal.kept_in_16_bits(config, task),
    ]
    if not task.unquantized and not kept:
        return quantization
    quantization = copy.copy(quantization)
    quantization.llm_int8_skip_modules = [*task.unquantized, *(("lm_head", *kept) if kept else ())]
    return quantization
