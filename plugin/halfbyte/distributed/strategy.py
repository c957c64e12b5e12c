"""The requested strategy against the one in use: any difference stops the run."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from halfbyte.distributed import support, zero3
from halfbyte.distributed.launcher import Request, requested
from halfbyte.distributed.ranks import on_every_rank
from halfbyte.errors import UserError

# Strategies that shard the base over the ranks.
SHARDED = ("fsdp2", "zero3")

_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}


@dataclass(frozen=True)
class Strategy:
    """The strategy in use: its name, the number of processes that train together, and this rank's device."""

    name: str
    world_size: int
    device: str

    def as_dict(self) -> dict[str, object]:
        """Return what run.json records of it."""
        return {"name": self.name, "world_size": self.world_size}


def refuse_unsupported(environment: Mapping[str, str] | None = None) -> None:
    """Raise :class:`UserError` if the launcher requested a strategy or an option that is always refused."""
    environment = os.environ if environment is None else environment
    strategy = _known(requested(environment).strategy)
    support.require(strategy)
    if (problem := support.refused_option(strategy, environment)) is not None:
        raise UserError(problem)
    if strategy == "zero3":
        zero3.require_installed()


def check_quantized(strategy: str, load_in_4bit: bool) -> None:
    """Raise :class:`UserError` if a base that is not in 4 bits would be sharded."""
    if not load_in_4bit:
        raise UserError(
            f"false under {strategy}: only 4-bit bases with adapters are tested there; remove it, or launch with DDP: "
            f"{support.DDP}",
            option="load_in_4bit",
        )


def strategy_in_use(*, on_cpu: bool = False, environment: Mapping[str, str] | None = None) -> Strategy:
    """Return the strategy of the running process group, on every rank.

    ``on_cpu`` says that the user wrote ``use_cpu: true``. Raises :class:`UserError` on all ranks when the strategy
    in use is not the requested one: one process would train in place of two, or each rank would train alone and
    overwrite the others' results.
    """
    state = PartialState()
    with on_every_rank("checking what was launched"):
        request = requested(environment)
        name = _name(request.strategy, state.distributed_type)
        strategy = Strategy(name, state.num_processes, device_name(state.device))
        if (problem := difference(request, strategy, on_cpu or _cpu_requested(state))) is not None:
            raise UserError(problem)
        support.require(_known(name))
        if state.distributed_type == DistributedType.NO and state.device.type == "cuda":
            _require_one_gpu(torch.cuda.device_count())
    return strategy


def difference(request: Request, in_use: Strategy, cpu_requested: bool) -> str | None:
    """Return what was requested and is not in use, with the command line that gives it; None if nothing differs."""
    processes = request.processes
    if in_use.world_size != processes:
        if request.launcher == "srun":
            return (
                f"srun started {processes} tasks, but each would train alone: let every node start one launcher, "
                f"as launch/slurm.sh does"
            )
        if in_use.world_size == 1 and request.launcher == "accelerate":
            return (
                f"{processes} processes were requested, but this one trains alone: accelerate starts one process for "
                f"`--cpu` and MULTI_CPU, and does not join ranks on CPUs without `use_cpu: true`; "
                f"instead: {command_line('cpu.yaml', processes, request.machines)}"
            )
        return (
            f"the launcher started {processes} processes, but {in_use.world_size} train together: without a GPU "
            f"a launch requires `use_cpu: true`; instead: {command_line('cpu.yaml', processes, request.machines)}"
        )
    if request.strategy not in (in_use.name, "single", "ddp"):
        name = support.STRATEGIES.get(request.strategy, request.strategy)
        return (
            f"{name} was requested, but the run is using {support.STRATEGIES[in_use.name]}: accelerate shards on GPUs "
            f"only, and prints nothing; instead: {command_line('cpu.yaml', processes, request.machines)}"
        )
    if request.use_cpu is False and processes > 1 and in_use.device == "cpu" and not cpu_requested:
        return (
            f"{processes} processes on GPUs were requested, and this machine has no visible GPU; to train on CPUs: "
            f"{command_line('cpu.yaml', processes, request.machines)}"
        )
    return None


def refuse_precision(dtype: str, why: str, environment: Mapping[str, str] | None = None) -> None:
    """Raise :class:`UserError` if the launcher sets a mixed precision other than the run's ``dtype``."""
    environment = os.environ if environment is None else environment
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched != "no" and _PRECISIONS.get(launched) != dtype:
        wanted = _PRECISIONS.get(launched)
        advice = f", or write `dtype: {wanted}`" if wanted else ""
        raise UserError(
            f"the launcher sets mixed_precision {launched}, but the run computes in {dtype} ({why}); "
            f"launch with `--mixed_precision no`{advice}"
        )


def command_line(file: str, processes: int, machines: int = 1) -> str:
    """Return the ``accelerate launch`` line that starts this same command on ``processes``."""
    recipe = next((word for word in sys.argv[1:] if not word.startswith("-")), "RECIPE")
    if machines > 1:
        file = "multi_node.yaml"
    return (
        f"accelerate launch --config_file launch/{file} --num_processes {processes} -m halfbyte {recipe} ..."
    )


def device_name(device: torch.device) -> str:
    """Return the GPU's model, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _known(strategy: str) -> str:
    return strategy if strategy in support.STRATEGIES else "other"


def _name(request: str, kind: DistributedType) -> str:
    """The strategy of a process group of ``kind`` once the trainer has prepared the model."""
    if kind == DistributedType.DEEPSPEED or (request.startswith("zero") and kind != DistributedType.NO):
        return request
    if kind == DistributedType.NO:
        return "single"
    if kind == DistributedType.MULTI_CPU:
        return "ddp"
    if kind in (DistributedType.MULTI_GPU, DistributedType.FSDP):
        return request if request.startswith(("fsdp", "megatron", "parallelism")) else "ddp"
    return "other"


def _cpu_requested(state: PartialState) -> bool:
    # A GPU-like process group over CPU ranks is deliberate.
    return state.distributed_type != DistributedType.MULTI_CPU


def _require_one_gpu(visible: int) -> None:
    """Raise if one process sees several GPUs: the trainer would wrap the model in ``nn.DataParallel``."""
    if visible > 1:
        reason = support.find("data_parallel").reason
        raise UserError(
            f"one process was started, and it sees {visible} GPUs: the trainer would wrap the model in "
            f"nn.DataParallel, which is refused ({reason}); instead: {command_line('ddp.yaml', visible)}, "
            f"or CUDA_VISIBLE_DEVICES=0 for one GPU"
        )
