"""Load a base model for this rank: quantized on the way in, or as it was quantized before."""

from typing import Any

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from halfbyte.errors import UserError


def load_base(
    name_or_path: str,
    *,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    revision: str = "main",
    trust_remote_code: bool = False,
    task_type: str = "CAUSAL_LM",
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """Load a 16-bit or pre-quantized checkpoint onto ``device`` and make it safe to train on.

    ``quantization`` says how to quantize a 16-bit checkpoint; one that is quantized already keeps its own
    quantization, which must be bitsandbytes' 4-bit, and only its compute dtype is replaced by ``dtype``.

    Raises :class:`UserError` when the checkpoint is missing, is in another quantization format, or wants
    code of its own without ``trust_remote_code``.
    """
    classification = task_type == "SEQ_CLS"
    auto = AutoModelForSequenceClassification if classification else AutoModelForCausalLM
    if classification:
        model_init_kwargs.setdefault("num_labels", 1)
        if quantization is not None:
            # The head of a reward model is trained from scratch: four bits would freeze it.
            quantization.llm_int8_skip_modules = ["score"]
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
        own = _own_quantization(config)
        _check_own_quantization(name_or_path, own, quantization)
        if quantization is not None and own is None:
            model_init_kwargs["quantization_config"] = quantization
        model = auto.from_pretrained(
            name_or_path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            # Under gloo accelerate numbers even the CPU, which as a device map would mean a GPU.
            # Under ZeRO-3 transformers takes no device map, and loads onto this rank's device by itself.
            device_map=None
            if is_deepspeed_zero3_enabled()
            else {"": "cpu" if device.type == "cpu" else device},
            **model_init_kwargs,
        )
    except UserError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the model {name_or_path!r} brings Python code of its own; read it, and if you trust it write "
                f"`trust_remote_code: true`"
            ) from error
        raise UserError(f"cannot load the model {name_or_path!r}: {_first_line(error)}") from error
    # No caller of a training model reads the cache, and padding-free attention is wrong with one.
    model.config.use_cache = False
    _prepare_linears(model, dtype)
    return model


def _own_quantization(config: Any) -> dict[str, Any] | None:
    own = getattr(config, "quantization_config", None)
    if own is None or isinstance(own, dict):
        return own
    return own.to_dict()


def _check_own_quantization(name: str, own: dict[str, Any] | None, wanted: BitsAndBytesConfig | None) -> None:
    if own is None:
        return
    method = own.get("quant_method")
    if method != "bitsandbytes":
        raise UserError(
            f"{name!r} is quantized with {method}; halfbyte trains on bitsandbytes 4-bit bases: "
            f"name the 16-bit checkpoint"
        )
    if wanted is None:
        raise UserError(
            f"{name!r} is quantized already, but `load_in_4bit` is false: name the 16-bit checkpoint"
        )
    if wanted.load_in_4bit and not own.get("load_in_4bit"):
        raise UserError(
            f"{name!r} is quantized in 8 bits; write `load_in_8bit: true`, or name the 16-bit checkpoint"
        )
    for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        if wanted.load_in_4bit and own.get(key) != getattr(wanted, key):
            option = {"bnb_4bit_use_double_quant": "use_bnb_nested_quant"}.get(key, key)
            raise UserError(
                f"{name!r} was quantized with {key}={own.get(key)}, but {option} is {getattr(wanted, key)}; "
                f"write `{option}: {str(own.get(key)).lower()}`, or name the 16-bit checkpoint"
            )


def _prepare_linears(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Fix the compute dtype of every 4-bit linear, and keep bitsandbytes from repacking its weights.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 (nn/modules.py, Linear4bit.forward) repacks a weight in
    place for inference at the first evaluation without gradients; gradients computed through it afterwards
    are wrong, and so is what is saved.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
            module.compute_type_is_set = True


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
