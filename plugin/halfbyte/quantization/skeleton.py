"""A model without weights, on meta, its linear layers as quantization makes them."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype, set_quantized_state
from transformers.quantizers import AutoHfQuantizer

from halfbyte import multimodal
from halfbyte.errors import UserError
from halfbyte.quantization.quantizer import registered
from halfbyte.task import Task
from halfbyte.terminal.wording import suggestion

# Linear layers of a few weights that a model reads itself, not by a product: packed bytes are no numbers to it.
_READ_AS_NUMBERS = {"gemma3n_text": ("prediction_coefs", "correction_coefs")}

# What ``from_pretrained`` takes beside its signature and hands to no model.
_OF_FILES = """
    adapter_kwargs adapter_name allow_all_kernels generation_config kernel_config key_mapping low_cpu_mem_usage
    max_memory offload_buffers offload_folder offload_state_dict proxies subfolder tqdm_class use_kernels variant
"""


def without_weights(
    name_or_path: str | Path,
    *,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    task: Task,
    entire: bool = False,
    init_kwargs: Mapping[str, Any] = MappingProxyType({}),
    **origin: Any,
) -> PreTrainedModel:
    """Return the model that ``name_or_path`` configures, on meta, its linear layers as ``quantization`` makes them.

    A checkpoint that is packed already decides how; without ``quantization`` the model is what it was before that.
    ``init_kwargs`` are those of ``from_pretrained``.
    """
    config, of_class = configured(name_or_path, {**task.model_kwargs, **init_kwargs}, origin)
    if isinstance(own := getattr(config, "quantization_config", None), dict):
        del config.quantization_config
    if quantization is not None and own is not None and own.get("quant_method") == "bitsandbytes":
        quantization = BitsAndBytesConfig.from_dict(own)
    elif quantization is not None:
        quantization = selective(quantization, config, task)
    auto = multimodal.model_class(config, task, entire=entire)
    with torch.device("meta"), set_quantized_state():  # under ZeRO-3 nothing of it is partitioned
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, **_of_code(origin), **of_class)
    if quantization is not None:
        with registered():
            quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        with local_torch_dtype(dtype, type(model).__name__):  # that of the biases of linear layers
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


def configured(
    name_or_path: str | Path, options: Mapping[str, Any], origin: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the configuration that ``from_pretrained`` makes with ``options``, and those left for the model's class.

    Raises :class:`UserError` for an option that nothing takes.
    """
    config, rest = transformers.AutoConfig.from_pretrained(
        name_or_path, return_unused_kwargs=True, **origin, **options
    )
    # Those that say how files are read change no model.
    known = {*inspect.signature(PreTrainedModel.from_pretrained).parameters, *_OF_FILES.split()}
    of_class = {name: value for name, value in options.items() if name in rest.keys() - known}
    if of_class and not origin.get("trust_remote_code"):
        name = next(iter(of_class))
        raise UserError(
            f"{name!r} is neither in the configuration of {type(config).__name__} nor an argument of "
            f"from_pretrained{suggestion(name, known | config.to_dict().keys())}",
            option="model_init_kwargs",
        )
    return config, of_class


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
