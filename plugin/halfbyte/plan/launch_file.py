"""What a launch file would run on this machine: strategy, ranks and devices, or why it would not."""

import re
import subprocess
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.config.config_args import ClusterConfig

from halfbyte.distributed import support
from halfbyte.distributed.launcher import Request, from_config
from halfbyte.errors import UserError
from halfbyte.files import read
from halfbyte.terminal.wording import first_line, shorten

_MOST = 1_000_000  # bytes


@dataclass
class Launch:
    """What ``file`` would run, the problems that would stop it on this machine, and notes for its user."""

    file: str
    runs: str
    request: Request
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def inspect(path: Path, gpus: int | None) -> Launch:
    """Check an accelerate configuration, a Slurm script or a TrainJob for a machine with ``gpus`` GPUs.

    None stands for as many as it takes. Raises :class:`UserError` if the file is none of these.
    """
    try:
        if not path.is_file():
            raise UserError(f"no file {path}", option="--launch")
        if path.suffix == ".sh":
            return _script(path, gpus)
        content = yaml.safe_load(read(path, _MOST).decode())
    except UserError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {shorten(str(path), 200)}: {first_line(error)}", option="--launch"
        ) from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {first_line(error)}", option="--launch") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a configuration of accelerate, Slurm or Kubeflow", option="--launch")
    try:
        return (
            _train_job(path, content)
            if content.get("kind") == "TrainJob"
            else _accelerate(path, content, gpus)
        )
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} has a value of the wrong type: {first_line(error)}", option="--launch"
        ) from error


def _accelerate(path: Path, config: dict[str, Any], gpus: int | None) -> Launch:
    unknown = sorted(set(config) - {f.name for f in fields(ClusterConfig)})
    request = from_config(config)
    launch = Launch(str(path), "", request)
    if unknown:
        launch.problems.append(f"accelerate has no option {', '.join(unknown)}")
    if "distributed_type" not in config:
        launch.problems.append("`distributed_type` is missing, which accelerate requires")
    kind = str(config.get("distributed_type", "NO")).upper()
    if kind in ("NO", "MULTI_CPU") and request.processes > 1:
        launch.problems.append(
            f"accelerate starts one process for distributed_type {kind}, not {request.processes}; "
            f"write MULTI_GPU (with `use_cpu: true` for CPUs)"
        )
    _judge(launch, request, gpus)
    chosen = {**(config.get("fsdp_config") or {}), **(config.get("deepspeed_config") or {})}
    if (problem := support.refused_option(request.strategy, chosen)) is not None:
        launch.problems.append(problem)
    if request.machines > 1 and not config.get("main_process_ip"):
        launch.notes.append("give every machine --machine_rank and --main_process_ip")
    if request.mixed_precision != "no":
        launch.notes.append(f"the run's dtype must be that of mixed_precision {request.mixed_precision}")
    return launch


def _judge(launch: Launch, request: Request, gpus: int | None) -> None:
    here = max(1, request.processes // request.machines)
    name = request.strategy if request.strategy in support.STRATEGIES else "other"
    row = support.find(name)
    place = "on CPUs" if request.use_cpu else f"on {'GPUs' if here > 1 else 'a GPU'}"
    machines = f" on each of {request.machines} machines" if request.machines > 1 else ""
    launch.runs = f"{support.STRATEGIES[name]}, {here} process{'es' if here > 1 else ''}{machines}, {place}"
    if not row.supported:
        launch.problems.append(
            f"{support.STRATEGIES[name]} is not supported: {row.reason}; instead: {row.instead}"
        )
    if request.processes % request.machines:
        launch.problems.append(
            f"{request.processes} processes do not divide among {request.machines} machines"
        )
    if request.use_cpu:
        if name.startswith("fsdp"):
            launch.problems.append("accelerate shards on GPUs only; with `use_cpu` this would be DDP")
    elif gpus is not None and here > max(gpus, 1):
        launch.problems.append(
            f"{here} GPUs are needed on each machine, and this one has {gpus}: --num_processes {max(gpus, 1)}"
            + (", or launch/cpu.yaml" if gpus == 0 else "")
        )
    elif gpus == 0:
        launch.notes.append("this machine has no GPU; it would train on its CPU")


def _script(path: Path, gpus: int | None) -> Launch:
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    text = read(path, _MOST).decode()
    named = re.search(r"--config_file\s+(\S+)", text)
    if named is None:
        raise UserError(f"{path} does not call `accelerate launch --config_file FILE`", option="--launch")
    file = path.parent / Path(named[1]).name
    if not file.is_file():
        raise UserError(f"{path} names {named[1]}, which is not beside it", option="--launch")
    inner = inspect(file, gpus)
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    nodes, per_node = int(directives.get("nodes", 1)), int(directives.get("gpus-per-node", 1))
    launch = replace(
        inner,
        file=str(path),
        notes=[],
        request=replace(inner.request, processes=nodes * per_node, machines=nodes),
    )
    if checked.returncode:
        launch.problems.append(checked.stderr.strip())
    if directives.get("ntasks-per-node") != "1":
        launch.problems.append("each node must start one launcher; write #SBATCH --ntasks-per-node=1")
    launch.runs = f"DDP, {per_node} processes on each of {nodes} machines, on GPUs"
    launch.problems = [problem for problem in launch.problems if "GPUs are needed" not in problem]
    launch.notes.append("the cluster's GPUs were not checked")
    return launch


def _train_job(path: Path, job: dict[str, Any]) -> Launch:
    trainer = (job.get("spec") or {}).get("trainer") or {}
    nodes, per_node = int(trainer.get("numNodes", 1)), trainer.get("numProcPerNode", 1)
    known = str(per_node).isdecimal()
    launch = Launch(
        str(path),
        f"DDP, {per_node} processes on each of {nodes} machines, on GPUs",
        Request("ddp", nodes * (int(per_node) if known else 1), nodes),
    )
    if not known:
        launch.problems.append(f"numProcPerNode is {per_node!r}; write the number of GPUs of a node")
    words = [*trainer.get("command", []), *trainer.get("args", [])]
    if words[:3] != ["torchrun", "-m", "halfbyte"]:
        launch.problems.append("spec.trainer must run `torchrun -m halfbyte RECIPE ...`")
    limit = ((trainer.get("resourcesPerNode") or {}).get("limits") or {}).get("nvidia.com/gpu")
    if str(limit) != str(per_node):
        launch.problems.append(f"{per_node} processes a node, but a limit of {limit} GPUs")
    launch.notes.append("the cluster's GPUs were not checked")
    return launch
