"""What a model must compute for one token of training: the numerator of its FLOPs utilization."""

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from halfbyte.memory.experts import experts_of_a_token
from halfbyte.quantization import stacks_of
from halfbyte.trainer.reference_identity import REFERENCE


def flops_per_token(model: nn.Module) -> int:
    """Return the FLOPs of one token in the matrix products of ``model``, forward and backward.

    A weight that is frozen takes part in two products, the output and the gradient of its input, and one that is
    trained in three; each is 2 FLOPs for each of its elements (arXiv 2001.08361, 2204.02311, appendix B). Of experts
    those count that a token goes to. Attention, recomputation and the reference of a preference run are left out.
    """
    per_token = experts_of_a_token(model.config)
    total = sum(4 * shape[1:].numel() * per_token for shape in stacks_of(model).values())
    shares = dict(_of_experts(model))
    for name, module in model.named_modules():
        if REFERENCE in name.split("."):
            continue
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            size = module.nx * module.nf
        else:
            continue
        size = size * per_token // shares[module] if module in shares else size
        total += size * (6 if module.weight.requires_grad else 4)
    return total


def _of_experts(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The factors of adapters on stacks, each of which holds those of all experts, and the number of experts."""
    for wrapper in model.modules():
        if isinstance(wrapper, ParamWrapper) and wrapper.num_experts > 1:
            factors: Any = (wrapper.lora_A, wrapper.lora_B)
            yield from ((linear, wrapper.num_experts) for each in factors for linear in each.values())
