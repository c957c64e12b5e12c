"""bitsandbytes optimizers on parameters that FSDP2 has divided: each rank steps on its own shard.

bitsandbytes' update kernels do not know DTensors. 32-bit states are kept as DTensors of their parameter's
layout, so that checkpoints save and load them like torch's own.
"""

from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from halfbyte.errors import UserError

_STATES = ("state1", "state2")


def check_optimizer(optim: str) -> None:
    """Raise :class:`UserError` for an optimizer whose state cannot be divided with the parameters."""
    if "8bit" in optim:
        better = (
            optim.replace("8bit", "32bit") if "paged" in optim or "lion" in optim else "paged_adamw_32bit"
        )
        raise UserError(
            f"optim: {optim} keeps block-wise scales that do not follow a divided parameter, so that its checkpoints "
            f"cannot be resumed; write `optim: {better}` or `optim: adamw_torch`"
        )


def step_on_shards(optimizer: Optimizer) -> None:
    """Make a bitsandbytes optimizer, just created, step on the local shards of its parameters; leave others alone."""
    if not isinstance(optimizer, Optimizer8bit) or isinstance(optimizer, _OnShards):
        return
    if optimizer.args.optim_bits != 32:
        check_optimizer(f"{type(optimizer).__name__} in 8bit")
    cls = type(optimizer)
    optimizer.__class__ = type(cls.__name__, (_OnShards, cls), {})


class _OnShards(Optimizer8bit):
    """What replaces, in a bitsandbytes optimizer, the methods that touch parameters and states."""

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
        if local.numel() == 0:  # an uneven division leaves the last ranks without a shard
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
        """Nothing ahead of the step: paged states come in as the kernel touches them."""

    def state_dict(self) -> dict[str, Any]:
        """torch's own form: bitsandbytes hides its states from FSDP, which here may gather them."""
        return Optimizer.state_dict(self)


def _like(parameter: DTensor, local: torch.Tensor) -> DTensor:
    """``local`` as this rank's shard of a tensor of ``parameter``'s shape and layout."""
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
