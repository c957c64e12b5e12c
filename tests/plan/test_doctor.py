"""The doctor reports what is wrong with a machine, and what a launch file would run on it."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from halfbyte import caches
from halfbyte.cli import main
from halfbyte.plan import doctor
from halfbyte.plan.launch_file import inspect

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(autouse=True)
def no_ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes take seconds to start: one test starts them."""
    if "real_ranks" not in request.fixturenames:
        monkeypatch.setattr(doctor.all_reduce, "failure", lambda backend: None)


@pytest.fixture
def real_ranks() -> None:
    """Mark a test that starts ranks."""


def written(directory: Path, **config: object) -> Path:
    path = directory / "launch.yaml"
    path.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **config}))
    return path


@pytest.mark.parametrize(
    ("name", "gpus", "runs"),
    [
        ("cpu.yaml", 0, "DDP, 2 processes, on CPUs"),
        ("cpu.yaml", 8, "DDP, 2 processes, on CPUs"),
        ("ddp.yaml", 8, "DDP, 8 processes, on GPUs"),
        ("fsdp2.yaml", 8, "FSDP2, 8 processes, on GPUs"),
        ("zero3.yaml", 8, "DeepSpeed ZeRO-3, 8 processes, on GPUs"),
        ("one_gpu.yaml", 1, "one process, 1 process, on a GPU"),
        ("multi_node.yaml", 8, "DDP, 8 processes on each of 2 machines, on GPUs"),
        ("slurm.sh", 0, "DDP, 8 processes on each of 2 machines, on GPUs"),
        ("kubernetes.yaml", 0, "DDP, 8 processes on each of 2 machines, on GPUs"),
    ],
)
def test_the_shipped_files_run_what_they_say(name: str, gpus: int, runs: str) -> None:
    launch = inspect(LAUNCH / name, gpus)
    assert (launch.runs, launch.problems) == (runs, [])


@pytest.mark.parametrize(
    ("config", "gpus", "words"),
    [
        ({"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}, 0, "starts one process"),
        ({"distributed_type": "NO", "num_processes": 2}, 2, "starts one process"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 2}, 0, "2 GPUs are needed"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 8}, 4, "--num_processes 4"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 3, "num_machines": 2}, 8, "do not divide"),
        ({"distributed_type": "FSDP", "num_processes": 2}, 2, "FSDP1 is not supported"),
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True},
                "num_processes": 2,
            },
            2,
            "write `fsdp_offload_params: false`",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}},
            1,
            "with a configuration file of its own is not supported",
        ),
        (
            {"distributed_type": "MULTI_GPU", "num_processes": 2, "num_procs": 2},
            2,
            "accelerate has no option num_procs",
        ),
        ({"num_processes": 1}, 1, "`distributed_type` is missing"),
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {"fsdp_version": 2},
                "num_processes": 2,
                "use_cpu": True,
            },
            0,
            "this would be DDP",
        ),
    ],
)
def test_what_would_go_wrong_is_reported(tmp_path: Path, config: dict, gpus: int, words: str) -> None:
    assert any(words in problem for problem in inspect(written(tmp_path, **config), gpus).problems)


def test_a_launch_that_would_not_run_as_it_says_is_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = written(tmp_path, distributed_type="MULTI_CPU", num_processes=2, use_cpu=True)
    assert main(["doctor", "--json", "--launch", str(wrong)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert "MULTI_GPU" in report["launch"]["problems"][0]


def test_two_ranks_add_up(real_ranks: None) -> None:
    assert doctor.all_reduce.failure("gloo") is None
    assert "no-such-backend" in str(doctor.all_reduce.failure("no-such-backend"))


def test_ranks_that_do_not_hear_each_other_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.all_reduce, "failure", lambda backend: "no answer within 90 seconds")
    assert main(["doctor"]) == 1
    assert "WRONG  2 ranks, gloo" in capsys.readouterr().out


def test_no_login_and_a_full_disk_are_warnings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "wandb_ready", lambda: False)
    monkeypatch.setattr(doctor, "_LEAST_DISK", 2**60)
    monkeypatch.setattr(doctor.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "get_token", lambda: None)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("warn ")] == [
        "free",
        "hub",
        "wandb",
    ]
    assert "hf auth login" in printed
    assert "wandb login" in printed


def test_this_machine_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--launch", str(LAUNCH / "cpu.yaml")]) == 0
    report = capsys.readouterr().out
    for name in (
        "torch",
        "trl",
        "bitsandbytes library",
        "bitsandbytes backend",
        "2 ranks, gloo",
        "free disk here",
        "hub",
        "compute dtype",
        "base cache",
        "wandb",
        "free memory",
    ):
        assert f"ok     {name} " in report
    assert "DDP, 2 processes, on CPUs" in report


def test_a_cache_that_cannot_be_written_and_an_old_version_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(caches, "provide", lambda: None)  # it sets variables of this process
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["torch>=99", "no-such-package>=1"])
    assert main(["doctor", "--json"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {name for name, check in checks.items() if not check["ok"]} == {
        "torch",
        "no-such-package",
        "base cache",
    }
    assert "pip install 'torch>=99'" in checks["torch"]["mend"]


@pytest.mark.parametrize("content", ["[]", "a: [", "echo hello"])
def test_another_kind_of_file_is_a_mistake(tmp_path: Path, content: str) -> None:
    path = tmp_path / ("x.sh" if "echo" in content else "x.yaml")
    path.write_text(content)
    assert main(["doctor", "--launch", str(path)]) == 2


def test_slurm_starts_one_launcher_a_node(tmp_path: Path) -> None:
    stubs = {
        "scontrol": "echo first; echo second",
        "srun": 'shift; for id in 0 1; do SLURM_NODEID=$id "$@"; done',
        "accelerate": 'printf "%s\\n" "$*"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sh"), "sft", "--config", "a file.yaml"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert f"--num_machines 2 --num_processes 16 --machine_rank {rank} --main_process_ip first" in line
        assert line.endswith("-m halfbyte sft --config a file.yaml")


def test_a_train_job_that_leaves_its_processes_open(tmp_path: Path) -> None:
    job = (Path(__file__).parents[2] / "launch" / "kubernetes.yaml").read_text()
    (tmp_path / "job.yaml").write_text(job.replace("numProcPerNode: 8", "numProcPerNode: auto"))
    found = inspect(tmp_path / "job.yaml", None)
    assert any("numProcPerNode is 'auto'; write the number" in each for each in found.problems)
