"""The shipped YAMLs read as they stand, and say what their names promise."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import DatasetMixtureConfig

from halfbyte import recipe as recipes
from halfbyte import run
from halfbyte.config import RunArguments, Settings, read
from halfbyte.plugin import QLoRAPlugin

SHIPPED = Path(__file__).parents[2] / "recipes" / "halfbyte_recipes"
YAMLS = sorted(SHIPPED.glob("*.yaml"))
CPU = ("--use_cpu", "--bf16", "false", "--report_to", "none")


def settings(path: Path, *options: str) -> Settings:
    """What ``halfbyte RECIPE --config path`` reads; the file's name begins with the recipe's."""
    recipe = recipes.load(path.stem.partition("_")[0])
    classes = (RunArguments, recipe.config, QLoRAPlugin, DatasetMixtureConfig)
    defaults = run.training_defaults(recipe.config)
    return read(["--config", str(path), *options], classes, prog=path.stem, defaults=defaults)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
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


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_a_recipe_yaml_names_no_secret_and_no_place(path: Path) -> None:
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert path.read_text(encoding="utf-8").startswith("# "), "the first line says what the file is for"
    assert not any(isinstance(value, str) and value.startswith(("/", "~", ".")) for value in written.values())
    assert not any(key.endswith(("_token", "_key")) for key in written)


def test_the_classic_example_is_the_classic_one() -> None:
    classic = settings(SHIPPED / "sft_llama2_7b.yaml")
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
    sft, dpo = (settings(SHIPPED / f"{name}_8b.yaml") for name in ("sft", "dpo"))
    assert dpo["adapter_name_or_path"] == sft["output_dir"] != dpo["output_dir"]
    assert dpo["model_name_or_path"] is None, "the base comes with the adapter"
