"""A model that runs outside autocast where autocast would change no dtype."""

import functools
import types
from typing import Any

import torch
from transformers import PreTrainedModel

from halfbyte.fast.linear import FusedLinear4bit


def entered(args: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.autocast:
    """Return the autocast that a trainer with ``args`` enters on ``device``, off for tensors of its own ``dtype``."""
    sixteen = torch.bfloat16 if args.bf16 else torch.float16
    enabled = bool(args.bf16 or args.fp16) and dtype != sixteen
    return torch.autocast(device.type, dtype=sixteen, enabled=enabled)


def leave(model: PreTrainedModel) -> str:
    """Run ``model`` outside autocast if all of it has autocast's dtype; return ``off: ...`` or ``kept: ...``.

    Autocast then only costs time: it looks at every operation, and casts adapters that fused linears cast themselves.
    Replaces the instance's ``forward``: the Trainer enters autocast around it, and calls nothing in between.
    """
    adapters = {id(p) for m in model.modules() if isinstance(m, FusedLinear4bit) for p in m.parameters()}
    rest = [p for p in model.parameters() if id(p) not in adapters]
    dtypes = {p.dtype for p in rest if p.is_floating_point()}
    if any(p.requires_grad for p in rest):
        return "kept: weights other than LoRA's are trained"
    if len(dtypes) != 1:
        return f"kept: the base is in {', '.join(sorted(map(str, dtypes)))}"
    (dtype,) = dtypes
    inner = model.forward

    # `generate` and the Trainer read the signature of a model's forward.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        device = self.device.type
        if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != dtype:
            return inner(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return inner(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return f"off: all in {dtype}"
