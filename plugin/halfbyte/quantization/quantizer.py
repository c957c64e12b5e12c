"""How transformers loads a model in four bits here: its bitsandbytes quantizer, which packs stacks of experts too."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn.modules import Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb4bitQuantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from halfbyte.quantization import experts, mxfp4, stacks_in_peft

_METHOD = "bitsandbytes_4bit"
_PARTS = tuple(name.removeprefix("weight") for name in Bnb4BitHfQuantizer.serialized_names["weight"])
# Linear layers of a class of their own that compute what nn.Linear does, and that transformers would leave in 16 bits.
_LINEARS = {"FalconLinear"}


class Quantizer(Bnb4BitHfQuantizer):
    """transformers' 4-bit quantizer with stacks of experts.

    transformers 5 keeps the experts of a layer as 3-D parameters, and bitsandbytes quantizes linear layers only
    (bitsandbytes #1849): 93% of a mixture-of-experts model would stay in 16 bits.
    """

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the parameter is a 4-bit linear's weight, or a stack that is packed."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(getattr(module, name, None), Params4bit)

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        """What quantizes a parameter once it was read and put together."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        """What puts parameters together that the model's own conversions do not: packed ones, or those in MXFP4."""
        found: list[Any] = super().get_weight_conversions()
        if self.pre_quantized:
            return found
        return [
            *found,
            *(WeightConverter(parts, name, [_FromMxfp4(self)]) for name, parts in mxfp4.NAMES.items()),
        ]

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """The model's own conversions, without those of packed stacks, which qwen3_vl_moe would transpose."""
        packed = tuple(name for name in self.serialized_names if name != "weight")
        kept = [
            each
            for each in weight_conversions
            if not (
                self.pre_quantized
                and isinstance(each, WeightConverter)
                and any(source.endswith(packed) for source in each.source_patterns)
            )
        ]
        found: list[Any] = super().update_weight_conversions(kept, model)
        return found

    def get_load_operations(self) -> dict[str, Any]:
        """What puts a packed parameter together from its tensors."""
        return {"deserialize": _Deserialize}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype that a tensor is read in; its own for :class:`_Deserialize`, which casts what is not packed."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, _Deserialize):
                operation.dtype = dtype
        found: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return found

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any, **kwargs: Any
    ) -> None:
        for path, module in list(model.named_modules()):
            if type(module).__name__ in _LINEARS and isinstance(module, nn.Linear):
                sizes = (module.in_features, module.out_features, module.bias is not None)
                model.set_submodule(path, nn.Linear(*sizes, device="meta", dtype=module.weight.dtype))
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        stacks_in_peft.install()
        settings = self.quantization_config
        self.serialized_names = dict(Bnb4BitHfQuantizer.serialized_names)
        for path, module, names in experts.modules(model):
            for name in names:
                parameter = getattr(module, name)
                if not experts.can_be_packed(parameter) or not should_convert_module(
                    path, self.modules_to_not_convert
                ):
                    continue
                storage = settings.bnb_4bit_quant_storage
                empty = torch.empty_like(
                    parameter, device="meta", dtype=storage if self.pre_quantized else None
                )
                template = Params4bit(
                    empty,
                    requires_grad=False,
                    compress_statistics=settings.bnb_4bit_use_double_quant,
                    quant_type=settings.bnb_4bit_quant_type,
                    quant_storage=storage,
                )
                setattr(module, name, template)
                saved = f"{path.rpartition('.')[2]}.{name}"
                self.serialized_names[saved] = [f"{saved}{part}" for part in _PARTS]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for _, module, names in list(experts.modules(model)):
            for name in names:
                if isinstance(getattr(module, name), Params4bit):
                    experts.dequantize_on_access(module, name)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Leave the experts of Llama 4 stacked: transformers would make linear layers of them."""


def is_packed_anew(own: Mapping[str, Any] | None, requested: BitsAndBytesConfig | None) -> bool:
    """Whether a checkpoint with a quantization of its ``own`` is dequantized while it is read, and packed in NF4."""
    return (
        own is not None
        and own.get("quant_method") == mxfp4.METHOD
        and requested is not None
        and requested.load_in_4bit
    )


def unread_by_transformers(module: nn.Module, name: str) -> str | None:
    """What plain transformers calls the parameter ``name`` of ``module`` if it cannot load it packed in four bits."""
    if name in experts.names_of(module):
        return "experts"
    return type(module).__name__ if type(module).__name__ in _LINEARS else None


@contextmanager
def registered() -> Iterator[None]:
    """Have transformers load 4-bit models by :class:`Quantizer` in this block.

    transformers registers quantizers by name, and a 4-bit configuration names bitsandbytes' whatever its class.
    """
    before = auto.AUTO_QUANTIZER_MAPPING[_METHOD]
    auto.AUTO_QUANTIZER_MAPPING[_METHOD] = Quantizer
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING[_METHOD] = before


class _FromMxfp4(Mxfp4Dequantize):
    """Dequantize a stack from MXFP4, in which gpt-oss is published, before it is packed."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        # The loader casts what will be quantized to the model's dtype, which holds every byte.
        parts = {
            name: (value[0] if isinstance(value, list) else value).to(torch.uint8)
            for name, value in input_dict.items()
        }
        found: dict[str, Tensor] = super().convert(parts, **kwargs)
        return found


class _Quantize(Bnb4bitQuantize):
    """Quantize a linear's weight as transformers does, a stack expert by expert."""

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            module, leaf = get_module_from_name(model, name)
            if leaf not in experts.names_of(module):
                result |= super().convert({name: value}, full_layer_name, model, **kwargs)
                continue
            weights = value[0] if isinstance(value, list) else value
            result[name] = experts.pack(weights, getattr(module, leaf))
        return result


class _Deserialize(Bnb4bitDeserialize):
    """Put a packed parameter together, a linear's as transformers does, and cast one that is not packed.

    Embeddings, norms and routers are `weight`s too, and transformers leaves them in the dtype of the checkpoint.
    """

    dtype: torch.dtype | None = None

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        key = min(input_dict, key=len)
        if len(input_dict) == 1:
            value = input_dict[key][0] if isinstance(input_dict[key], list) else input_dict[key]
            return {key: value.to(self.dtype) if value.is_floating_point() else value}
        if key == "weight":
            found: dict[str, Any] = super().convert(input_dict, model, full_layer_name, **kwargs)
            return found
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        data = tensors.pop(key)
        return {key: Params4bit.from_prequantized(data, tensors, requires_grad=False, device=data.device)}
