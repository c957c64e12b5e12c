"""bitsandbytes optimizers on parameters that FSDP2 has sharded: each rank steps on its own shard.

bitsandbytes' update kernels do not support DTensors. 32-bit states are kept as DTensors with their parameter's
layout, so that checkpoints save and load them like those of torch's optimizers.
"""

from typing import Any

import torch
from bitsandbytes.optim import AdEMAMix
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from halfbyte.errors import UserError

_STATES = ("state1", "state2")


def check_optimizer(optim: str) -> None:
    """Raise :class:`UserError` for an optimizer, by its name in `optim`, whose state cannot be sharded."""
    if "8bit" in optim or "ademamix" in optim:
        raise _refusal(optim, _instead(optim), eight_bit="8bit" in optim)


def step_on_shards(optimizer: Optimizer) -> None:
    """Make a newly created bitsandbytes optimizer step on the local shards of its parameters; others are unchanged.

    Raises :class:`UserError` for one whose state cannot be sharded.
    """
    if not isinstance(optimizer, Optimizer8bit) or isinstance(optimizer, _OnShards):
        return
    cls = type(optimizer)
    eight_bit = optimizer.args.optim_bits != 32
    if eight_bit or isinstance(optimizer, AdEMAMix):
        raise _refusal(cls.__name__, "paged_adamw_32bit", eight_bit=eight_bit)
    optimizer.__class__ = type(cls.__name__, (_OnShards, cls), {})


def _instead(optim: str) -> str:
    if optim in ("lion_8bit", "paged_lion_8bit"):
        return optim.replace("8bit", "32bit")
    torch_family = optim.startswith(("adamw_torch", "galore", "apollo"))
    return "adamw_torch" if torch_family else "paged_adamw_32bit"


def _refusal(what: str, instead: str, *, eight_bit: bool) -> UserError:
    reason = (
        "its 8-bit states are quantized in blocks, which do not follow a sharded parameter"
        if eight_bit
        else "its state does not have its parameter's shape, and cannot be sharded with it"
    )
    return UserError(
        f"{what}: {reason}; write `optim: {instead}`, or launch with launch/ddp.yaml", option="optim"
    )


class _OnShards(Optimizer8bit):
    """Replacements for the methods of a bitsandbytes optimizer that touch parameters and states."""

    def init_state(self, group: dict[str, Any], p: Any, gindex: int, pindex: int) -> None:
        if not isinstance(p, DTensor):
            super().init_state(group, p, gindex, pindex)
            return
        local = p.to_local().detach()
        super().init_state(group, local, gindex, pindex)
        state = self.state.pop(local)
        for key in _STATES:
            if key in state:
                state[key] = _like(p, state[key])
        self.state[p] = state

    def update_step(self, group: dict[str, Any], p: Any, gindex: int, pindex: int) -> None:
        if not isinstance(p, DTensor):
            super().update_step(group, p, gindex, pindex)
            return
        state = self.state[p]
        local = torch.nn.Parameter(p.to_local().detach())
        if local.numel() == 0:  # uneven sharding leaves the last ranks without a shard
            state["step"] += 1
            return
        assert isinstance(p.grad, DTensor)
        local.grad = p.grad.to_local()
        self.state[local] = {k: v.to_local() if isinstance(v, DTensor) else v for k, v in state.items()}
        try:
            super().update_step(group, local, gindex, pindex)
        finally:
            state["step"] = self.state.pop(local)["step"]

    def prefetch_state(self, p: Any) -> None:
        """Do nothing: paged states are fetched when the kernel touches them."""

    def state_dict(self) -> dict[str, Any]:
        """Return torch's own form: bitsandbytes hides its states from FSDP, which here may gather them."""
        return Optimizer.state_dict(self)


def _like(parameter: DTensor, local: torch.Tensor) -> DTensor:
    """``local`` as this rank's shard of a DTensor with ``parameter``'s shape and layout."""
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
