"""How the norms of a layer compute: forms are tried until one returns what the norm does."""

import copy
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.fast import members
from halfbyte.fast.norm import Norm, NormForm

_WITHIN = 1e-4


def equal(mine: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors differ by rounding in float32 only."""
    return bool((mine - theirs).norm() <= _WITHIN * theirs.norm())


def norm_forms(module: nn.Module) -> dict[str, NormForm]:
    """Return how each norm in ``module`` computes, by name; one of another kind is left out."""
    found = {name: _norm_form(each) for name, each in module.named_modules() if members.is_norm(each)}
    return {name: form for name, form in found.items() if form is not None}


@torch.no_grad()
def _norm_form(module: Any) -> NormForm | None:
    weight, eps = getattr(module, "weight", None), members.epsilon(module)
    width = getattr(module, "normalized_shape", (16,)) if weight is None else weight.shape
    if weight is not None and weight.dim() != 1:
        return None
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, width[-1], generator=generator, device="cpu") + 0.5
    forms = [NormForm(*each) for each in product((False, True), repeat=3)]
    try:
        theirs = module(x)
    except Exception:  # a norm of more than its input
        return None
    same = [form for form in forms if equal(Norm(module, eps, form).forward(x)[0], theirs)]
    # Where rounding comes shows in 16 bits.
    rounded, x = copy.deepcopy(module).to(torch.bfloat16), x.bfloat16()
    theirs = rounded(x).float()

    def error(form: NormForm) -> float:
        return (Norm(rounded, eps, form).forward(x)[0].float() - theirs).norm().item()

    return min(same, key=error, default=None)
