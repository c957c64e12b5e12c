"""What a model must compute for one token of training: the numerator of its FLOPs utilization."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from halfbyte.trainer.reference_identity import REFERENCE


def flops_per_token(model: nn.Module) -> int:
    """Return the FLOPs of one token in the matrix products of ``model``, forward and backward.

    A weight that is frozen takes part in two products, the output and the gradient of its input, and one that is
    trained in three; each is 2 FLOPs for each of its elements (arXiv 2001.08361, 2204.02311, appendix B). Attention,
    recomputation and the reference of a preference run are left out.
    """
    total = 0
    for name, module in model.named_modules():
        if REFERENCE in name.split("."):
            continue
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            size = module.nx * module.nf
        else:
            continue
        total += size * (6 if module.weight.requires_grad else 4)
    return total
