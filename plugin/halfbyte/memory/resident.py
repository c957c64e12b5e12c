"""What a rank holds for the whole run: the base in four bits, the rest of it, adapters, and the optimizer's state.

The sizes are those of the tensors, or what they will be where a model is on meta (:mod:`halfbyte.quantization.size`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import bitsandbytes as bnb
from torch import nn
from torch.nn import Parameter
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.quantization.size import packed_bytes, state_bytes

# Layers gathered at once: the one that is computed and the one that is prefetched.
_AHEAD = 2


@dataclass(frozen=True)
class Weights:
    """The bytes of a model's parameters: in four bits with what dequantizes them, the other frozen ones, adapters.

    ``trained`` are those of ``adapters``, or of all weights, that are trained.
    """

    four_bit: int
    quantization_state: int
    other: int
    adapters: int
    trained: int

    def held_by(self, share: int) -> int:
        """Return the bytes on one of ``share`` ranks that hold the weights together; each dequantizes by itself."""
        return self.quantization_state + (self.four_bit + self.other + self.adapters) // share


def weights(model: nn.Module) -> Weights:
    """Return the sizes of the parameters of ``model``, each counted once."""
    four_bit = state = other = adapters = trained = 0
    for name, parameter in _parameters(model):
        if isinstance(parameter, bnb.nn.Params4bit):
            four_bit += packed_bytes(parameter)
            state += state_bytes(parameter)
            continue
        size = _bytes(parameter)
        trained += size if parameter.requires_grad else 0
        if parameter.requires_grad or ".lora_" in name:
            adapters += size
        else:
            other += size
    return Weights(four_bit, state, other, adapters, trained)


def gathered(model: nn.Module) -> int:
    """Return the bytes that a rank of a sharded model has whole while it computes: embeddings, head, two layers."""
    layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    inside = {id(each) for layer in layers for each in layer.parameters()}
    sizes = [sum(_bytes(each) for each in layer.parameters()) for layer in layers]
    root = sum(_bytes(each) for _, each in _parameters(model) if id(each) not in inside)
    return root + _AHEAD * max(sizes, default=0)


def optimizer_state(model: nn.Module, optim: str) -> int:
    """Return the bytes of the state that the optimizer ``optim`` keeps of the trained parameters."""
    trained = [each for _, each in _parameters(model) if each.requires_grad]
    return sum(_of_parameter(optim, each) for each in trained)


def is_paged(optim: str) -> bool:
    """Whether the state of ``optim`` moves to the host where the device has no room for it."""
    return optim.startswith("paged_")


# Values that an optimizer keeps of each trained one; transformers' names begin so.
_MOMENTS = (("sgd", 0), ("lion", 1), ("adagrad", 1), ("rmsprop", 1), ("ademamix", 3), ("apollo", 0))
_EIGHT_BITS, _BLOCK = (
    4096,
    256,
)  # values from which bitsandbytes keeps state in 8 bits, and those with one scale


def _of_parameter(optim: str, parameter: Parameter) -> int:
    name = optim.removeprefix("paged_")
    if name.startswith("adafactor"):  # a mean for each row and each column
        rows_and_columns = sum(parameter.shape) if parameter.dim() > 1 else parameter.numel()
        return 4 * rows_and_columns
    moments = next((count for prefix, count in _MOMENTS if name.startswith(prefix)), 2)
    count = parameter.numel()
    if name.endswith(("8bit", "_bnb_8bit")) and count >= _EIGHT_BITS:
        return moments * (count + 4 * math.ceil(count / _BLOCK))
    return moments * 4 * count


def _parameters(model: nn.Module) -> Iterator[tuple[str, Parameter]]:
    yield from model.named_parameters()  # tied ones once


def _bytes(parameter: Parameter) -> int:
    if isinstance(parameter, bnb.nn.Int8Params):
        return parameter.numel()  # on meta it has its dtype yet to come
    return packed_bytes(parameter) if isinstance(parameter, bnb.nn.Params4bit) else parameter.nbytes
