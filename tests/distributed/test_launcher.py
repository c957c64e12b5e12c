"""The requested launch is read from its environment and from its own command line."""

from pathlib import Path

import psutil
import pytest
import yaml

from halfbyte.distributed import launcher
from halfbyte.distributed.launcher import Request, accelerate_arguments, from_command_line, from_environment

ROOT = Path(__file__).parents[2]


class Parent(psutil.Process):
    """A parent process with a command line of our choosing."""

    def __init__(self, *words: str, name: str = "python", cwd: Path = ROOT) -> None:
        self._words, self._called, self._at = list(words), name, str(cwd)

    def cmdline(self) -> list[str]:
        return self._words

    def name(self) -> str:
        return self._called

    def cwd(self) -> str:
        return self._at


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch --cpu x.py",
        "/usr/bin/python3.11 /opt/bin/accelerate launch --cpu x.py",
        "/usr/bin/python3 -u -X dev /opt/bin/accelerate-launch --cpu x.py",
        "python -m accelerate.commands.launch --cpu x.py",
        "python -I -m accelerate.commands.accelerate_cli launch --cpu x.py",
        "python /lib/site-packages/accelerate/commands/launch.py --cpu x.py",
    ],
)
def test_the_launcher_is_recognised(command: str) -> None:
    assert accelerate_arguments(command.split()) == ["--cpu", "x.py"]


@pytest.mark.parametrize(
    "command",
    [
        "",
        "bash",
        "accelerate config",
        "accelerate",
        "python -m torch.distributed.run --nproc_per_node 2 x.py",
        "vim accelerate launch",
        "python train.py accelerate launch --num_processes 2",
        "python -c accelerate launch",
        "python /home/me/launch.py --num_processes 2",
        "make accelerate-launch",
    ],
)
def test_what_only_looks_like_the_launcher_is_not(command: str) -> None:
    assert accelerate_arguments(command.split()) is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Request()),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Request("ddp", 4, 2)),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "1"}, Request("ddp", launcher="torchrun")),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, Request("ddp", 2)),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, Request("fsdp1", 2)),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, Request("fsdp2", 2)),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, Request("zero3")),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "a"}, Request("deepspeed_file")),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, Request("megatron")),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, Request("parallelism")),
        ({"ACCELERATE_USE_CPU": "True"}, Request("single", use_cpu=True)),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, Request(mixed_precision="bf16")),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_CPU": "False"}, Request()),
    ],
)  # fmt: skip
def test_the_environment_says(environment: dict[str, str], expected: Request) -> None:
    assert from_environment(environment) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--cpu --num_processes 2 -m halfbyte sft", ("ddp", 2, 1, True)),
        ("--num_processes 1 -m halfbyte sft --num_processes 8", ("single", 1, 1, False)),
        ("--multi_gpu --num_processes 3 -m halfbyte sft", ("ddp", 3, 1, False)),
        ("--num_machines 2 --num_processes 2 --cpu -m halfbyte sft", ("ddp", 2, 2, True)),
        ("--use_fsdp --fsdp_version 2 --num_processes 2 -m halfbyte sft", ("fsdp2", 2, 1, False)),
        ("--use_fsdp --num_processes 2 -m halfbyte sft", ("fsdp1", 2, 1, False)),
        ("--use_deepspeed --zero_stage 3 --num_processes 2 -m halfbyte sft", ("zero3", 2, 1, False)),
        ("--use_deepspeed --deepspeed_config_file ds.json -m halfbyte sft", ("deepspeed_file", 1, 1, False)),
        ("--config_file launch/cpu.yaml -m halfbyte sft", ("ddp", 2, 1, True)),
        ("--config_file launch/cpu.yaml --num_processes 3 -m halfbyte sft", ("ddp", 3, 1, True)),
        ("--config_file launch/one_gpu.yaml -m halfbyte sft", ("single", 1, 1, False)),
    ],
)
def test_the_command_line_says(words: str, expected: tuple[str, int, int, bool]) -> None:
    found = from_command_line(words.split(), ROOT)
    assert found is not None
    assert (found.strategy, found.processes, found.machines, found.use_cpu) == expected


def test_a_file_that_asks_for_what_its_launcher_cannot_start(tmp_path: Path) -> None:
    config = {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    found = from_command_line(["--config_file", "two.yaml", "x.py"], tmp_path)
    assert found == Request("ddp", 2, 1, True, "no", "accelerate")


def test_no_valid_call_is_no_request() -> None:
    assert from_command_line(["--no_such_option", "--num_processes", "two", "x.py"], ROOT) is None


def test_the_parent_tells_what_the_environment_does_not() -> None:
    parent = Parent(
        "python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "halfbyte"
    )
    found = launcher.requested({"ACCELERATE_USE_CPU": "True"}, parent)
    assert (found.strategy, found.processes, found.launcher) == ("ddp", 2, "accelerate")
    assert launcher.requested({}, Parent("bash", "-c", "halfbyte")) == Request()


@pytest.mark.parametrize(
    ("launched", "expected"),
    [
        ("/usr/bin/python3 /env/bin/accelerate launch --config_file launch/cpu.yaml -m halfbyte",
         "accelerate launch --config_file launch/cpu.yaml -m halfbyte"),
        ("python -m accelerate.commands.launch --num_processes 2 -m halfbyte",
         "accelerate launch --num_processes 2 -m halfbyte"),
        ("/env/bin/python /env/bin/torchrun --nproc_per_node 2 -m halfbyte",
         "torchrun --nproc_per_node 2 -m halfbyte"),
        ("python -m torch.distributed.run --nproc_per_node 2 -m halfbyte",
         "python -m torch.distributed.run --nproc_per_node 2 -m halfbyte"),
        ("bash", None),
    ],
)  # fmt: skip
def test_the_launchers_words_can_be_typed_again(launched: str, expected: str | None) -> None:
    own = ["sft", "--config", "a file.yaml"]
    found = launcher.launch_command(own, Parent(*launched.split(), *own))
    assert found == (expected.split() if expected is not None else None)
    assert launcher.launch_command(["dpo"], Parent(*launched.split(), *own)) is None


def test_srun_alone_starts_strangers() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2"}
    assert launcher.requested(step, Parent("slurmstepd: [1.0]", name="slurmstepd")).processes == 2
    assert launcher.requested(step, Parent("wandb", "agent")).processes == 1, (
        "a sweep's runs train alone by intent"
    )
