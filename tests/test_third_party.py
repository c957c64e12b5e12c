"""A stranger's package: built as a wheel, installed beside halfbyte, listed and trained by its names.

Nothing in halfbyte knows these recipes; the second is the shape of RLHF, with generation and a reward.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from halfbyte.cli import main
from tests import launch, tiny

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "stranger-recipes"
version = "3.1"
dependencies = ["halfbyte"]

[project.entry-points."halfbyte.recipes"]
scaled-sft = "stranger_recipes.scaled:recipe"
brevity = "stranger_recipes.brevity:recipe"

[tool.hatch.build.targets.wheel]
packages = ["stranger_recipes"]
"""

# The least a recipe can be: a config with a field of its own, a trainer that uses it, and a sentence.
SCALED = '''\
"""SFT whose loss is scaled by an option of its own."""

from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer

from halfbyte import Recipe


@dataclass
class ScaledConfig(SFTConfig):
    loss_scale: float = field(default=1.0, metadata={"help": "What the loss is multiplied by."})
    learning_rate: float = field(default=1e-2, metadata={"help": "The initial learning rate."})


class ScaledTrainer(SFTTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return (loss[0] * self.args.loss_scale, *loss[1:]) if isinstance(loss, tuple) else loss * self.args.loss_scale


recipe = Recipe(config=ScaledConfig, trainer=ScaledTrainer, summary="SFT with a scaled loss")
'''

BREVITY = '''\
"""Group relative policy optimization towards completions without the letter e."""

from dataclasses import dataclass, field

from trl import GRPOConfig, GRPOTrainer

from halfbyte import Recipe


@dataclass
class BrevityConfig(GRPOConfig):
    forbidden: str = field(default="e", metadata={"help": "The letter that costs reward."})
    learning_rate: float = field(default=1e-2, metadata={"help": "The initial learning rate."})


def build(config, plugin, data):
    def without_the_letter(completions, **kwargs):
        print("rewarding", len(completions), "completions", flush=True)
        return [float(-completion.count(config.forbidden) - len(completion)) for completion in completions]

    return plugin.trainer(
        GRPOTrainer, args=config, train_dataset=data.train, reward_funcs=[without_the_letter]
    )


recipe = Recipe(config=BrevityConfig, summary="GRPO with a reward of its own", build=build)
'''

TRAINING = (
    *("--max_steps", "2", "--logging_steps", "1", "--report_to", "none", "--save_strategy", "no"),
    *("--dtype", "float32", "--per_device_train_batch_size", "2"),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the stranger's wheel is installed into."""
    root = tmp_path_factory.mktemp("stranger")
    project, wheels, site = root / "project", root / "wheels", root / "site"
    (project / "stranger_recipes").mkdir(parents=True)
    (project / "pyproject.toml").write_text(PYPROJECT)
    for name, code in (("__init__", ""), ("scaled", SCALED), ("brevity", BREVITY)):
        (project / "stranger_recipes" / f"{name}.py").write_text(code)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(wheels)]
    subprocess.run([*build, str(project)], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True
    )
    return site


@pytest.fixture(scope="module")
def model(model_dir) -> str:
    return str(model_dir("llama"))


def record(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())


def logged(output: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def assert_trained(output: Path, recipe: str) -> None:
    told = record(output)
    assert (told["status"], told["recipe"], told["steps"]) == ("completed", recipe, 2)
    assert told["base"]["four_bit_share"] == 1.0
    weights = load_file(output / "adapter_model.safetensors")
    silent = [name for name, w in weights.items() if "lora_B" in name and not w.abs().max() > 0]
    assert not silent, f"these adapters did not train: {silent}"


def test_both_recipes_are_listed_beside_the_shipped_ones(site: Path) -> None:
    done = launch.halfbyte("recipes", "--json", PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    listed = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert {"sft", "dpo", "pretrain", "scaled-sft", "brevity"} <= set(listed)
    assert listed["brevity"] == {
        "name": "brevity",
        "package": "stranger-recipes",
        "version": "3.1",
        "object": "stranger_recipes.brevity:recipe",
    }


def test_config_trainer_and_summary_are_enough(site: Path, tmp_path: Path, model: str) -> None:
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(12))
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {model}\ndataset_name: {rows}\nloss_scale: 1\n")
    output, shipped = tmp_path / "run", tmp_path / "shipped"
    options = ("--model_name_or_path", model, "--dataset_name", rows, *TRAINING)
    done = launch.halfbyte(
        *("scaled-sft", "--config", str(tmp_path / "run.yaml"), *TRAINING),
        *("--output_dir", str(output), "--loss_scale", "3"),
        PYTHONPATH=str(site),
    )
    assert done.returncode == 0, done.stderr
    assert_trained(output, "scaled-sft")
    config = record(output)["config"]
    assert config["loss_scale"] == 3.0
    # The recipe's own default stands, and QLoRA's fill in where it has none.
    assert config["learning_rate"] == 1e-2
    assert config["gradient_checkpointing"] is True
    assert main(["sft", *options, "--output_dir", str(shipped), "--learning_rate", "1e-2"]) == 0
    assert logged(output, "loss")[0] == pytest.approx(3 * logged(shipped, "loss")[0], rel=1e-6)


def test_a_build_function_makes_a_trainer_with_a_reward(site: Path, tmp_path: Path, model: str) -> None:
    rows = tiny.write_rows(tmp_path / "rows", [{"prompt": tiny.text(n)} for n in range(12)])
    output = tmp_path / "run"
    grpo = ("--num_generations", "2", "--max_completion_length", "8", "--forbidden", "a", "--beta", "0.1")
    paths = ("--model_name_or_path", model, "--dataset_name", rows, "--output_dir", str(output))
    done = launch.halfbyte("brevity", *paths, *grpo, *TRAINING, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert_trained(output, "brevity")
    assert done.stdout.count("rewarding 2 completions") >= 2
    rewards = logged(output, "rewards/without_the_letter/mean")
    assert len(rewards) == 2
    assert all(reward < 0 for reward in rewards)
    assert rewards == logged(output, "reward")
    assert logged(output, "kl")[0] == pytest.approx(0, abs=1e-6)  # the reference is the base, adapter off
    assert record(output)["data"]["rows"] == 8
    assert record(output)["config"]["forbidden"] == "a"


def test_a_recipe_s_own_option_is_in_its_help_and_is_checked(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(SystemExit) as ended:
        main(["scaled-sft", "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "loss_scale" in said
    assert "What the loss is multiplied by." in said
    output = tmp_path / "run"
    assert main(["scaled-sft", "--loss_scal", "2", "--output_dir", str(output)]) == 2
    assert "did you mean loss_scale" in capsys.readouterr().err
    assert not output.exists()
