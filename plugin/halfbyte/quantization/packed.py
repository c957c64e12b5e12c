"""A weight in four bits as files hold it: packed and unpacked by itself, without a model."""

from collections.abc import Mapping

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from halfbyte.quantization import mxfp4

_STATE = "quant_state.bitsandbytes__"


def pack(weight: Tensor, template: bnb.nn.Params4bit) -> dict[str, Tensor]:
    """Quantize ``weight`` ``[out, in]`` with the settings of ``template``, as loading a model does.

    Returns the tensors of a pre-quantized checkpoint by what follows the parameter's name, "" for the packed bytes.
    """
    return parts_of(bnb.nn.Params4bit(weight, requires_grad=False, **template.__dict__).to(weight.device))


def parts_of(parameter: bnb.nn.Params4bit) -> dict[str, Tensor]:
    """The tensors of a parameter in four bits, as :func:`pack` returns them."""
    state: dict[str, Tensor] = parameter.quant_state.as_dict(packed=True)
    return {"": parameter.data, **{f".{name}": value for name, value in state.items()}}


def is_packed(parts: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of a parameter are what :func:`pack` returns."""
    return any(name.startswith(f".{_STATE}") for name in parts)


def unpack(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the weight that packed ``parts`` stand for, float32 ``[out, in]``."""
    packed = parts[""]
    given = {name.removeprefix("."): value for name, value in parts.items() if name}
    state = QuantState.from_dict(given, device=packed.device)
    state.dtype = torch.float32
    weight: Tensor = bnb.functional.dequantize_4bit(packed, state)
    return weight


def parameter_of(name: str) -> str:
    """The parameter that a tensor of a checkpoint belongs to: its own name, or what precedes that of a part."""
    parameter, dot, _ = name.partition(f".{_STATE}")
    if dot:
        return parameter
    parameter, _, part = name.rpartition(".")
    return parameter if part in _PARTS else mxfp4.parameter_of(name)


_PARTS = {"absmax", "quant_map", "nested_absmax", "nested_quant_map"}
