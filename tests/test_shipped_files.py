"""What ships is right as it stands: launch files, and the wheel that carries everything."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes" / "halfbyte_recipes").glob("*.yaml"))
# The cluster's manifests are the doctor's to check; these are accelerate's.
LAUNCH = sorted(path for path in (ROOT / "launch").glob("*.yaml") if path.name != "kubernetes.yaml")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The launchers that `accelerate launch` would have started, with their arguments."""
    found: list[tuple[str, Any]] = []
    for name in [name for name in vars(launch) if name.endswith("_launcher")]:
        monkeypatch.setattr(launch, name, lambda args, name=name: found.append((name, args)))
    return found


# file -> launcher, processes, on the CPU
LAUNCHES = {
    "cpu.yaml": ("multi_gpu_launcher", 2, True),
    "ddp.yaml": ("multi_gpu_launcher", 8, False),
    "fsdp2.yaml": ("multi_gpu_launcher", 8, False),
    "zero3.yaml": ("deepspeed_launcher", 8, False),
    "multi_node.yaml": ("multi_gpu_launcher", 16, False),
    "one_gpu.yaml": ("simple_launcher", 1, False),
}


@pytest.mark.parametrize("path", LAUNCH, ids=lambda p: p.name)
def test_a_launch_file_starts_what_its_name_says(path: Path, started: list[tuple[str, Any]]) -> None:
    loaded = load_config_from_file(str(path))
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= set(loaded.to_dict()) | set(vars(loaded))
    words = ["--config_file", str(path), "-m", "halfbyte", "sft"]
    launch.launch_command(launch.launch_command_parser().parse_args(words))
    ((launcher, arguments),) = started
    assert (launcher, arguments.num_processes, arguments.use_cpu) == LAUNCHES[path.name]
    # Precision is the run's: a launcher that sets its own would contradict `dtype`.
    assert arguments.mixed_precision == "no"
    assert bool(arguments.use_fsdp) == (path.name == "fsdp2.yaml")
    assert bool(arguments.use_deepspeed) == (path.name == "zero3.yaml")
    assert (arguments.module, arguments.training_script, arguments.training_script_args) == (
        True,
        "halfbyte",
        ["sft"],
    )


def test_the_number_of_processes_is_the_command_lines_when_it_is_given(
    started: list[tuple[str, Any]],
) -> None:
    words = [
        "--config_file",
        str(ROOT / "launch" / "ddp.yaml"),
        "--num_processes",
        "4",
        "-m",
        "halfbyte",
        "sft",
    ]
    launch.launch_command(launch.launch_command_parser().parse_args(words))
    assert [arguments.num_processes for _, arguments in started] == [4]


def test_every_launch_comment_names_its_own_file() -> None:
    assert {path.name for path in LAUNCH} == set(LAUNCHES)
    for path in LAUNCH:
        assert f"--config_file launch/{path.name} -m halfbyte" in path.read_text(encoding="utf-8")


def test_the_wheel_carries_everything_that_is_not_python(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("halfbyte-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("entry_points.txt"))
        entry_points = archive.read(metadata).decode()
    assert {f"halfbyte/launch/{path.name}" for path in (ROOT / "launch").iterdir()} <= names
    assert {f"halfbyte_recipes/{path.name}" for path in RECIPES} <= names
    assert {"halfbyte/py.typed", "halfbyte_recipes/py.typed", "halfbyte/demo/chatml.jinja"} <= names
    for package in (ROOT / "plugin" / "halfbyte", ROOT / "recipes" / "halfbyte_recipes"):
        modules = {str(path.relative_to(package.parent)) for path in package.rglob("*.py")}
        assert modules <= names
    assert not [name for name in names if name.startswith("tests/") or "__pycache__" in name]
    for name in ("dpo", "kto", "pretrain", "reward", "sft"):
        assert f"{name} = halfbyte_recipes.{name}:recipe" in entry_points
    assert "halfbyte = halfbyte.cli:main" in entry_points
