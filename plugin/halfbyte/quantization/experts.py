"""Stacks of experts in four bits: the 3-D parameters of a mixture-of-experts layer, packed as one.

A stack is ``[E, O, I]``, or ``[E, I, O]`` where the architecture stores it transposed. It is packed as bitsandbytes
packs the whole of it, but expert by expert, so that no temporary is larger than one; no block of scales crosses an
expert. Read as an attribute of its module a packed stack is dequantized (bitsandbytes' parametrization), whole, for as
long as the module's forward lasts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from torch import Tensor, nn

from halfbyte.quantization.size import NESTED_BLOCK

_NAMES = ("gate_up_proj", "up_proj", "down_proj")
_BLOCK = 64  # bitsandbytes' default
_MOST = 2**31 - 1  # weights that bitsandbytes' kernels count (0.50, backends/cuda/ops.py)


@dataclass(frozen=True)
class Stack:
    """The packed weights of all experts of one module, and what dequantizes them: None before they are loaded."""

    data: Tensor
    state: QuantState | None

    @property
    def shape(self) -> torch.Size:
        """``[E, O, I]`` or ``[E, I, O]``."""
        return self.data.shape if self.state is None else torch.Size(self.state.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are dequantized to where they are read."""
        dtype: torch.dtype = self._state.dtype
        return dtype

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Return all experts, dequantized."""
        if self.shape.numel() > _MOST:
            scales = self.scales()
            return torch.stack([self.expert(index, scales, dtype) for index in range(self.shape[0])])
        weight: Tensor = functional.dequantize_4bit(self.data.view(torch.uint8), self._state)
        return weight.to(dtype)

    def scales(self) -> Tensor:
        """Return the scale of every block, float32 ``[E, blocks]``."""
        state = self._state
        scales: Tensor = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        return scales.float().view(self.shape[0], -1)

    def expert(self, index: int, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return expert ``index``, dequantized by its row of :meth:`scales`; bitwise what :meth:`whole` has there."""
        state, shape = self._state, self.shape[1:]
        size = shape.numel() // 2
        packed = self.data.view(torch.uint8).view(-1)[index * size : (index + 1) * size, None]
        of_one = QuantState(
            scales[index], shape, state.code, state.blocksize, state.quant_type, dtype=state.dtype
        )
        weight: Tensor = functional.dequantize_4bit(packed, of_one)
        return weight.to(dtype)

    @property
    def _state(self) -> QuantState:
        assert self.state is not None, "the experts are not loaded"
        return self.state


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Yield every module of experts with its path and the names of its stacks, packed or not."""
    for path, module in model.named_modules():
        found = names_of(module)
        if found:
            yield path, module, found


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of every stack of ``model``, packed or not, by the path that PEFT and checkpoints name it by."""
    return {
        f"{path}.{name}": _shape(module, name) for path, module, names in modules(model) for name in names
    }


def names_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the stacks that ``module`` itself holds: 3-D parameters, one matrix an expert."""
    own = dict(module.named_parameters(recurse=False))
    return tuple(
        name
        for name in _NAMES
        if name in _parametrized(module) or (name in own and len(_shape(module, name)) == 3)
    )


def packed(module: nn.Module, name: str) -> Stack | None:
    """The stack ``name`` of ``module`` as it is now, if it is in four bits."""
    lists = _parametrized(module)
    if name in lists:
        # Not the state of the parameter: of a sharded model it is a plain one.
        return Stack(lists[name].original, lists[name][0].quant_state)
    parameter = getattr(module, name)
    return Stack(parameter, parameter.quant_state) if isinstance(parameter, Params4bit) else None


def can_be_packed(parameter: Tensor) -> bool:
    """Whether no block of weights with one scale would cross from one expert of a stack to the next."""
    return parameter[0].numel() % _BLOCK == 0


def pack(weights: Tensor, template: Params4bit) -> Params4bit:
    """Quantize a stack with the settings of ``template``, expert by expert; bitwise as bitsandbytes does it whole."""
    settings = {
        name: getattr(template, name)
        for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    }
    made = [
        functional.quantize_4bit(expert.contiguous(), **{**settings, "compress_statistics": False})
        for expert in weights
    ]
    absmax = torch.cat([state.absmax for _, state in made])
    first = made[0][1]
    state = QuantState(
        absmax, weights.shape, first.code, template.blocksize, template.quant_type, dtype=weights.dtype
    )
    if template.compress_statistics:
        state.offset = absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(
            absmax - state.offset, blocksize=NESTED_BLOCK
        )
        state.nested = True
    return Params4bit(
        torch.cat([data for data, _ in made]),
        requires_grad=False,
        quant_state=state,
        bnb_quantized=True,
        **settings,
    )


def dequantize_on_access(module: nn.Module, name: str) -> None:
    """Have ``module`` give its packed stack ``name`` out dequantized, and save it as bitsandbytes saves a linear's."""
    parameter = getattr(module, name)
    assert isinstance(parameter, Params4bit)
    state = parameter.quant_state.as_dict(packed=True)
    replace_parameter_4bit_prequantized(module, name, state, parameter.device)
    # One state for both: what moves or casts the parameter moves and casts what reads it.
    parameter.quant_state = module.parametrizations[name][0].quant_state  # type: ignore[union-attr,index]


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Have every packed stack of ``model`` dequantized to ``dtype``."""
    for _, module, names in modules(model):
        for name in names:
            stack = packed(module, name)
            if stack is not None and stack.state is not None:
                stack.state.dtype = dtype


def _shape(module: nn.Module, name: str) -> torch.Size:
    """The shape of the stack ``name`` of ``module``, packed or not."""
    stack: Any = packed(module, name) or getattr(module, name)
    shape: torch.Size = stack.shape
    return shape


def _parametrized(module: nn.Module) -> Any:
    """The parametrizations of ``module`` by the name of what they give."""
    return getattr(module, "parametrizations", {})
