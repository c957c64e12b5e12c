"""One tensor of a sharded model: this rank's shard of it, and the whole of it. FSDP2 and ZeRO-3."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of ``model`` are sharded over the ranks, by FSDP2 or by ZeRO-3."""
    return isinstance(model, FSDPModule) or any(hasattr(p, "ds_id") for p in model.parameters())


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of ``tensor``, detached and sharing its storage; all of it where it is not sharded.

    FSDP2: ``[ceil(N / ranks), ...]`` rows of ``[N, ...]``, possibly none. ZeRO-3: a flat, padded piece.
    """
    if isinstance(tensor, DTensor):
        return tensor.to_local().detach()
    return getattr(tensor, "ds_tensor", tensor).detach()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of ``tensor`` in host memory, in its full shape, on every rank; a collective where it is sharded."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach().cpu()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone()
    return tensor.detach().cpu()
