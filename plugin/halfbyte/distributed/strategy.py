"""The strategy a run was launched under: which one is in force, and which ones are refused."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from halfbyte.distributed import fsdp2, zero3
from halfbyte.errors import UserError

# Strategies that divide the base over the ranks.
SHARDED = ("fsdp2", "zero3")

_DDP_LINE = "accelerate launch --config_file launch/ddp.yaml -m halfbyte ..."

# Launchers that make a 4-bit run wrong in stock accelerate and are not proven here yet.
REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: it does not load 4-bit bases",
}


@dataclass(frozen=True)
class Strategy:
    """How many processes train together, and how they share the work."""

    name: str
    world_size: int
    device: str

    def as_dict(self) -> dict[str, object]:
        return {"name": self.name, "world_size": self.world_size}


def refuse_unsupported(environment: Mapping[str, str] = os.environ) -> None:
    """Raise :class:`UserError` if the launcher asked for a strategy that is refused."""
    for variable, reason in REFUSED.items():
        if environment.get(variable, "false").lower() in ("1", "true", "yes"):
            raise UserError(f"this run was launched under {reason}; launch it with DDP: {_DDP_LINE}")
    if fsdp2.requested(environment):
        fsdp2.refuse_unsupported(environment)
    if zero3.requested(environment):
        zero3.refuse_unsupported(environment)


def strategy_in_force(environment: Mapping[str, str] = os.environ) -> Strategy:
    """Return the strategy of the running process group.

    Raises :class:`UserError` when the launcher started more processes than train together: each would
    train alone and overwrite the others' results.
    """
    state = PartialState()
    launched = int(environment.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise UserError(
            f"the launcher started {launched} processes, but {state.num_processes} train together: without a GPU "
            f"a launch needs `use_cpu: true`, as in launch/cpu.yaml"
        )
    if state.distributed_type == DistributedType.NO:
        name = "single"
    elif zero3.requested(environment):
        name = "zero3"
    elif state.distributed_type in (DistributedType.MULTI_GPU, DistributedType.FSDP) and fsdp2.requested(
        environment
    ):
        name = "fsdp2"
    elif state.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        name = "ddp"
    else:
        raise UserError(
            f"4-bit training under {state.distributed_type.value} is not proven; use DDP: {_DDP_LINE}"
        )
    if fsdp2.requested(environment) and name != "fsdp2":
        raise UserError(
            f"FSDP2 was asked for, but {name} is in force: accelerate shards on GPUs only, and on CPUs silently does "
            f"not; on CPUs launch with `accelerate launch --config_file launch/cpu.yaml -m halfbyte ...`"
        )
    return Strategy(name, state.num_processes, device_name(state.device))


def check_quantized(strategy: str, load_in_4bit: bool) -> None:
    """Raise :class:`UserError` if a base that is not in four bits is to be divided."""
    if not load_in_4bit:
        raise UserError(
            f"load_in_4bit: false under {strategy}: only 4-bit bases with adapters are proven there; take it out, or "
            f"launch with DDP: {_DDP_LINE}"
        )


def device_name(device: torch.device) -> str:
    """A name for people: the GPU's model, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
