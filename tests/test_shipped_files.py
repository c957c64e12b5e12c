"""What ships is right as it stands: recipe YAMLs, launch files, and the wheel that carries both."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from trl import DatasetMixtureConfig

from halfbyte import recipe as recipes
from halfbyte import train
from halfbyte.config import RunArguments, Settings, read
from halfbyte.plugin import QLoRAPlugin

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes" / "halfbyte_recipes").glob("*.yaml"))
# The cluster's manifests are the doctor's to check; these are accelerate's.
LAUNCH = sorted(path for path in (ROOT / "launch").glob("*.yaml") if path.name != "kubernetes.yaml")
CPU = ("--use_cpu", "--bf16", "false", "--report_to", "none")


def settings(path: Path, *options: str) -> Settings:
    """What ``halfbyte RECIPE --config path`` reads; the file's name begins with the recipe's."""
    recipe = recipes.load(path.stem.partition("_")[0])
    classes = (RunArguments, recipe.config, QLoRAPlugin, DatasetMixtureConfig)
    defaults = train.training_defaults(recipe.config)
    return read(["--config", str(path), *options], classes, prog=path.stem, defaults=defaults)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_a_recipe_yaml_builds_what_it_says(path: Path) -> None:
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    script, training, plugin, _ = settings(path, *CPU).build()
    assert script.dataset_name == written["dataset_name"]
    assert training.output_dir == written["output_dir"]
    assert plugin.model_name_or_path == written.get("model_name_or_path")
    assert plugin.adapter_name_or_path == written.get("adapter_name_or_path")
    assert plugin.model_name_or_path or plugin.adapter_name_or_path
    assert (plugin.load_in_4bit, plugin.use_bnb_nested_quant, plugin.use_peft) == (True, True, True)
    assert settings(path).given.keys() == written.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_a_recipe_yaml_names_no_secret_and_no_place(path: Path) -> None:
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert path.read_text(encoding="utf-8").startswith("# "), "the first line says what the file is for"
    assert not any(isinstance(value, str) and value.startswith(("/", "~", ".")) for value in written.values())
    assert not any(key.endswith(("_token", "_key")) for key in written)


def test_the_classic_example_is_the_classic_one() -> None:
    classic = settings(ROOT / "recipes" / "halfbyte_recipes" / "sft_llama2_7b.yaml")
    expected: dict[str, Any] = {
        "model_name_or_path": "meta-llama/Llama-2-7b-hf",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.05,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "save_steps": 1000,
    }
    assert {key: classic[key] for key in expected} == expected


def test_dpo_8b_starts_where_sft_8b_ends() -> None:
    sft, dpo = (
        settings(ROOT / "recipes" / "halfbyte_recipes" / f"{name}_8b.yaml") for name in ("sft", "dpo")
    )
    assert dpo["adapter_name_or_path"] == sft["output_dir"] != dpo["output_dir"]
    assert dpo["model_name_or_path"] is None, "the base comes with the adapter"


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
    for name in ("dpo", "pretrain", "sft"):
        assert f"{name} = halfbyte_recipes.{name}:recipe" in entry_points
    assert "halfbyte = halfbyte.cli:main" in entry_points
