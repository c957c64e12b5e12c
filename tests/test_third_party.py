"""A third party's package: built as a wheel, installed beside halfbyte, listed and trained by its names.

Nothing in halfbyte knows the recipes of ``tests/third_party``: the least that a recipe can be, GRPO with a reward of
its own, a reward model over another task, and a trainer over rows of another format.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from halfbyte.cli import main
from tests import launch, tiny

STEPS = (
    *("--max_steps", "2", "--logging_steps", "1", "--report_to", "none"),
    *("--dtype", "float32", "--per_device_train_batch_size", "2"),
)
TRAINING = (*STEPS, "--save_strategy", "no")
SAVED = (*STEPS, "--save_strategy", "steps", "--save_steps", "1")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the wheel is installed into."""
    root = tmp_path_factory.mktemp("third-party")
    project, wheels, site = root / "project", root / "wheels", root / "site"
    shutil.copytree(Path(__file__).parent / "third_party", project)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(wheels)]
    subprocess.run([*build, str(project)], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True
    )
    return site


@pytest.fixture
def imported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package on the path of this process."""
    monkeypatch.syspath_prepend(str(site))


@pytest.fixture(scope="module")
def model(model_dir) -> str:
    return str(model_dir("llama"))


def record(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())


def logged(output: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def assert_trained(output: Path, recipe: str) -> None:
    found = record(output)
    assert (found["status"], found["recipe"], found["steps"]) == ("completed", recipe, 2)
    assert found["base"]["four_bit_share"] == 1.0
    weights = load_file(output / "adapter_model.safetensors")
    silent = [name for name, w in weights.items() if "lora_B" in name and not w.abs().max() > 0]
    assert not silent, f"these adapters did not train: {silent}"


def test_its_recipes_are_listed_beside_the_shipped_ones(site: Path) -> None:
    done = launch.halfbyte("recipes", "--json", PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    listed = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert {"sft", "dpo", "pretrain", "scaled-sft", "brevity", "scores", "unpaired"} <= set(listed)
    assert listed["brevity"] == {
        "name": "brevity",
        "package": "third-party-recipes",
        "version": "3.1",
        "object": "third_party_recipes.brevity:recipe",
    }


@pytest.mark.usefixtures("imported")
def test_config_trainer_and_summary_are_enough(tmp_path: Path, model: str) -> None:
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(12))
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {model}\ndataset_name: {rows}\nloss_scale: 1\n")
    output, shipped = tmp_path / "run", tmp_path / "shipped"
    options = ("--model_name_or_path", model, "--dataset_name", rows, *TRAINING)
    words = ("--config", str(tmp_path / "run.yaml"), *TRAINING, "--output_dir", str(output))
    assert main(["scaled-sft", *words, "--loss_scale", "3"]) == 0
    assert_trained(output, "scaled-sft")
    assert record(output)["data"]["tokens"] > 0  # counted, although the recipe names no format
    config = record(output)["config"]
    assert config["loss_scale"] == 3.0
    # The recipe's own default stands, and QLoRA's fill in where it has none.
    assert config["learning_rate"] == 1e-2
    assert config["gradient_checkpointing"] is True
    assert main(["sft", *options, "--output_dir", str(shipped), "--learning_rate", "1e-2"]) == 0
    assert logged(output, "loss")[0] == pytest.approx(3 * logged(shipped, "loss")[0], rel=1e-6)


@pytest.mark.usefixtures("imported")
def test_a_build_function_makes_a_trainer_with_a_reward(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.write_rows(tmp_path / "rows", [{"prompt": tiny.text(n)} for n in range(12)])
    output = tmp_path / "run"
    grpo = ("--num_generations", "2", "--max_completion_length", "8", "--forbidden", "a", "--beta", "0.1")
    paths = ("--model_name_or_path", model, "--dataset_name", rows, "--output_dir", str(output))
    assert main(["brevity", *paths, *grpo, *TRAINING]) == 0
    assert_trained(output, "brevity")
    assert capsys.readouterr().out.count("rewarding 2 completions") >= 2
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


EVALUATED = (
    *("--max_steps", "3", "--logging_steps", "1", "--report_to", "none", "--save_steps", "1"),
    *("--dtype", "float32", "--per_device_train_batch_size", "2"),
    *("--eval_strategy", "steps", "--eval_steps", "3", "--eval_on_start", "true"),
)
STEP = r"step 2/3  loss \S+  lr \d\.\de-\d\d  grad \S+  "


def unpaired(rows: int) -> list[dict]:
    pairs = tiny.preferences(rows)
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]


def length(text: str) -> int:
    """Tokens of ``text`` with the end token."""
    return len(tiny.tokenizer()(text)["input_ids"]) + 1


def plots(output: Path) -> set[str]:
    return {path.stem for path in (output / "plots").iterdir()}


@pytest.mark.usefixtures("imported")
def test_a_reward_model(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny.preferences(16)
    output = tmp_path / "run"
    data = tiny.write_rows(tmp_path / "rows", rows)
    options = ("--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(output))
    assert main(["scores", *options, *EVALUATED, "--center_rewards_coefficient", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(STEP + r"accuracy \d\.\d{3}  margin \S+  \S+ tok/s", line) for line in lines), (
        lines
    )
    assert any(re.fullmatch(r"step 0/3  eval  loss \S+  accuracy \S+  margin \S+", line) for line in lines)
    for figure in ("loss", "accuracy", "margin", "score"):
        assert any(re.fullmatch(rf"eval {figure} +-?\d\S+ -> -?\d\S+", line) for line in lines), figure

    found = record(output)
    assert (found["status"], found["recipe"], found["steps"]) == ("completed", "scores", 3)
    assert found["config"]["lora_task_type"] == "SEQ_CLS"
    assert found["base"]["four_bit_share"] == 1.0
    tokens = sum(length(row["prompt"] + row[side]) for row in rows[:-4] for side in ("chosen", "rejected"))
    assert (found["data"]["rows"], found["data"]["tokens"], found["data"]["dropped"]) == (12, tokens, 0)
    assert plots(output) == {"loss", "learning_rate", "grad_norm", "accuracy", "scores"}
    card = (output / "README.md").read_text()
    assert "| center_rewards_coefficient | 0.01 |" in card
    assert "AutoModelForSequenceClassification.from_pretrained(" in card
    assert "num_labels=1" in card

    head = "base_model.model.score.weight"
    first, last = (
        load_file(path / "adapter_model.safetensors") for path in (output / "checkpoint-1", output)
    )
    assert last[head].dtype == torch.float32
    assert (last[head] - first[head]).abs().max() > 1e-4, "the head did not train"
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    loaded = PeftModel.from_pretrained(base, str(output)).base_model.model
    assert torch.equal(loaded.score.modules_to_save["default"].weight, last[head])


@pytest.mark.usefixtures("imported")
def test_a_resumed_reward_model_is_the_uninterrupted_one(tmp_path: Path, model: str) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    data = tiny.write_rows(tmp_path / "rows", tiny.preferences(16))
    options = ("scores", "--model_name_or_path", model, "--dataset_name", data, *SAVED)
    assert main([*options, "--output_dir", str(whole)]) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-2")
    assert main([*options, "--output_dir", str(resumed), "--resume_from_checkpoint", "auto"]) == 0
    first, second = (load_file(output / "adapter_model.safetensors") for output in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("imported")
def test_unpaired_preferences(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = unpaired(8)
    output = tmp_path / "run"
    data = tiny.write_rows(tmp_path / "rows", rows)
    options = ("--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(output))
    assert main(["unpaired", *options, *EVALUATED]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(STEP + r"kl \S+  margin \S+  \S+ tok/s", line) for line in lines), lines
    assert any(re.fullmatch(r"eval margin +0\.0000 -> -?\d\S+", line) for line in lines)

    found = record(output)
    assert (found["status"], found["recipe"], found["steps"]) == ("completed", "unpaired", 3)
    assert found["config"]["lora_task_type"] == "CAUSAL_LM"
    tokens = sum(length(row["prompt"] + row["completion"]) for row in rows[:-4])
    assert (found["data"]["rows"], found["data"]["tokens"]) == (12, tokens)
    assert plots(output) == {"loss", "learning_rate", "grad_norm", "kl", "rewards"}
    assert "| desirable_weight | 1 |" in (output / "README.md").read_text()
    weights = load_file(output / "adapter_model.safetensors")
    assert all(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    ("recipe", "rows", "problem"),
    [
        (
            "scores",
            [*tiny.preferences(5), {"prompt": "a", "chosen": None, "rejected": "b"}],
            "column 'chosen'",
        ),
        ("unpaired", [*unpaired(3)[:5], {"prompt": "a", "completion": "b", "label": None}], "column 'label'"),
    ],
)
def test_their_rows_are_checked(
    recipe: str,
    rows: list[dict],
    problem: str,
    tmp_path: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    data = tiny.write_rows(tmp_path / "rows", [*rows, *rows[:4]])
    options = ("--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(output))
    assert main([recipe, *options, *TRAINING]) == 2
    assert f"train row 6: {problem}" in capsys.readouterr().err
    assert not output.exists()
