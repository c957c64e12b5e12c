"""What the launcher was requested to do: read from the environment it set, and from its own command line.

The command line is needed because some launches set nothing: ``accelerate launch --cpu --num_processes 2`` starts
one process, whose environment does not mention a second.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import yaml

_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_DISTRIBUTED_TYPES = {"NO": "single", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp", "MEGATRON_LM": "megatron"}


@dataclass(frozen=True)
class Request:
    """The requested launch. ``use_cpu`` is None where the launcher does not set it."""

    strategy: str = "single"
    processes: int = 1
    machines: int = 1
    use_cpu: bool | None = None
    mixed_precision: str = "no"
    launcher: str | None = None


def requested(environment: Mapping[str, str] | None = None, parent: psutil.Process | None = None) -> Request:
    """Return the requested launch: from the environment or the command line, whichever requests more processes.

    ``environment`` is this process's by default: looked up at each call, because `datasets` replaces ``os.environ``
    when it maps by several processes.
    """
    environment = os.environ if environment is None else environment
    found = from_environment(environment)
    parent = parent or psutil.Process().parent()
    try:
        words, name, cwd = parent.cmdline(), parent.name(), parent.cwd()
    except (psutil.Error, AttributeError, OSError):
        return found  # the launcher has exited, or belongs to another user
    launched = accelerate_arguments(words)
    if launched is not None:
        written = from_command_line(launched, Path(cwd))
        return found if written is None else _merge(found, written)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if name == "slurmstepd" and found.processes == 1 and tasks > 1:
        # srun without a launcher: every task runs this same command, unaware of the others.
        return Request("ddp", tasks, launcher="srun")
    return found


def launch_command(own: Sequence[str], parent: psutil.Process | None = None) -> list[str] | None:
    """Return the launcher's command line without the words ``own`` of this command; None without a launcher."""
    parent = parent or psutil.Process().parent()
    try:
        words = parent.cmdline()
    except (psutil.Error, AttributeError):
        return None
    before, after = words[: len(words) - len(own)], words[len(words) - len(own) :]
    if not own or after != list(own):
        return None
    launched = accelerate_arguments(before)
    if launched is not None:
        return ["accelerate", "launch", *launched]
    # A script's first word is its interpreter: `python /.../bin/torchrun` was typed as `torchrun`.
    if len(before) > 1 and Path(before[1]).name == "torchrun":
        return ["torchrun", *before[2:]]
    return before if "torch.distributed.run" in before else None


def from_environment(environment: Mapping[str, str]) -> Request:
    """Read the variables that accelerate, torchrun and MPI set for a rank."""
    processes = max(int(environment.get(name) or 1) for name in _WORLD_SIZES)
    local = int(environment.get("LOCAL_WORLD_SIZE") or processes)
    if is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        strategy = _deepspeed(stage, environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    elif is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        strategy = "parallelism"
    elif is_on(environment, "ACCELERATE_USE_FSDP"):
        strategy = f"fsdp{environment.get('FSDP_VERSION', '1')}"
    elif is_on(environment, "ACCELERATE_USE_MEGATRON_LM"):
        strategy = "megatron"
    else:
        strategy = "ddp" if processes > 1 or "LOCAL_RANK" in environment else "single"
    return Request(
        strategy,
        processes,
        machines=max(1, processes // max(1, local)),
        use_cpu=is_on(environment, "ACCELERATE_USE_CPU") or None,
        mixed_precision=environment.get("ACCELERATE_MIXED_PRECISION", "no").lower(),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else None,
    )


def accelerate_arguments(command: Sequence[str]) -> list[str] | None:
    """Return the words after ``accelerate launch``, or None if ``command`` is not an accelerate launcher."""
    words = list(command)
    if words and Path(words[0]).name.startswith("python"):
        words = words[1:]
        while words and words[0].startswith("-") and words[0] not in ("-m", "-c"):
            words = words[2:] if words[0] in ("-X", "-W") else words[1:]
    if words[:2] == ["-m", "accelerate.commands.launch"]:
        return words[2:]
    if words[:3] == ["-m", "accelerate.commands.accelerate_cli", "launch"]:
        return words[3:]
    name = Path(words[0]).name if words else ""
    if name == "accelerate-launch" or (
        name == "launch.py" and words[0].endswith("accelerate/commands/launch.py")
    ):
        return words[1:]
    return words[2:] if name == "accelerate" and words[1:2] == ["launch"] else None


def from_command_line(arguments: Sequence[str], directory: Path) -> Request | None:
    """Parse ``accelerate launch ARGUMENTS``, called in ``directory``; None if the arguments are invalid."""
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    try:
        with redirect_stderr(StringIO()):
            options = launch_command_parser().parse_args(list(arguments))
    except SystemExit:
        return None
    file = directory / options.config_file if options.config_file else Path(default_config_file)
    config: dict[str, Any] = {}
    if file.is_file() and (options.config_file or not options.cpu):
        config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return from_config(config, options)


def from_config(config: Mapping[str, Any], options: Any = None) -> Request:
    """Read an accelerate configuration; the launcher's own ``options`` override it."""

    def chosen(name: str, default: Any) -> Any:
        value = getattr(options, name, None)
        return value if value is not None else config.get(name, default)

    kind = str(config.get("distributed_type", "NO")).upper()
    fsdp, deepspeed = config.get("fsdp_config") or {}, config.get("deepspeed_config") or {}
    processes = int(chosen("num_processes", 1))
    if getattr(options, "use_deepspeed", False):
        strategy = _deepspeed(options.zero_stage or 2, options.deepspeed_config_file)
    elif getattr(options, "use_fsdp", False):
        strategy = f"fsdp{options.fsdp_version or 1}"
    elif getattr(options, "use_megatron_lm", False):
        strategy = "megatron"
    elif kind == "DEEPSPEED":
        strategy = _deepspeed(deepspeed.get("zero_stage", 2), deepspeed.get("deepspeed_config_file"))
    elif kind == "FSDP":
        strategy = f"fsdp{fsdp.get('fsdp_version', 1)}"
    else:
        strategy = _DISTRIBUTED_TYPES.get(kind, "other")
        if strategy == "single" and (processes > 1 or getattr(options, "multi_gpu", False)):
            strategy = "ddp"
    return Request(
        strategy,
        processes,
        machines=int(chosen("num_machines", 1)),
        use_cpu=bool(getattr(options, "cpu", False) or config.get("use_cpu", False)),
        mixed_precision=str(chosen("mixed_precision", "no")).lower(),
        launcher="accelerate",
    )


def _merge(found: Request, written: Request) -> Request:
    """Combine the environment's request with what only the command line shows."""
    silent = found.strategy in ("single", "ddp") and written.strategy not in ("single", "ddp")
    return Request(
        written.strategy if silent or written.processes > found.processes else found.strategy,
        max(found.processes, written.processes),
        written.machines,
        found.use_cpu or written.use_cpu,
        found.mixed_precision,
        "accelerate",
    )


def _deepspeed(stage: object, file: object) -> str:
    """The strategy of a DeepSpeed ``stage``; a DeepSpeed configuration ``file`` replaces all other options."""
    return f"zero{stage}" if str(file or "none").lower() == "none" else "deepspeed_file"


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Whether the variable ``name`` is set to what accelerate reads as true."""
    return environment.get(name, "false").lower() in ("1", "true", "yes")
