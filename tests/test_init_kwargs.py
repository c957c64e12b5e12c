"""`model_init_kwargs` is TRL's way of setting the dtype: what it sets counts as the option of that meaning."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig

from halfbyte import QLoRAPlugin, loading, resolve, run
from halfbyte import recipe as recipes
from halfbyte.errors import UserError


def decided(tmp_path: Path, kwargs: dict[str, Any], **plugin: Any) -> resolve.Decisions:
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", model_init_kwargs=kwargs)
    return resolve.for_arguments(QLoRAPlugin(**plugin), args, "a-model")


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16])
def test_the_dtype_is_taken_from_the_arguments(tmp_path: Path, name: str, value: Any) -> None:
    found = decided(tmp_path, {name: value, "attn_implementation": "sdpa"})
    assert found.dtype == "bfloat16"
    assert found.values["model_init_kwargs"] == {"attn_implementation": "sdpa"}
    assert decided(tmp_path, {name: value}, dtype="bfloat16").dtype == "bfloat16"


def test_auto_leaves_the_choice_to_the_device(tmp_path: Path) -> None:
    assert decided(tmp_path, {"dtype": "auto"}).dtype == decided(tmp_path, {}).dtype == "float32"


def test_the_revision_is_taken_too(tmp_path: Path) -> None:
    assert decided(tmp_path, {"revision": "v2"}).revision == "v2"


@pytest.mark.parametrize(
    ("kwargs", "plugin", "message"),
    [
        ({"dtype": "bfloat16"}, {"dtype": "float32"}, "dtype is 'bfloat16' here, and `dtype` is 'float32'; write one"),
        ({"revision": "v2"}, {"model_revision": "v1"}, "revision is 'v2' here, and `model_revision` is 'v1'"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, {}, "write one of the two"),
        ({"dtype": "bf16"}, {}, "'bf16' is not supported; write one of auto, bfloat16, float16, float32"),
        ({"device_map": "auto"}, {}, "device_map is decided by halfbyte: each rank loads"),
        ({"quantization_config": {}}, {}, "quantization_config is decided by halfbyte: .*`load_in_4bit`"),
        ({"trust_remote_code": True}, {}, "write `trust_remote_code`, an option of its own"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(tmp_path: Path, kwargs: dict, plugin: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"model_init_kwargs: .*{message}"):
        decided(tmp_path, kwargs, **plugin)


def test_the_command_line_takes_it_alike(tmp_path: Path) -> None:
    words = ["--model_name_or_path", "a-model", "--output_dir", str(tmp_path), "--report_to", "none"]
    words += ["--use_cpu", "true", "--model_init_kwargs", '{"dtype": "float32"}']
    settings = run.read("sft", recipes.load("sft"), words)
    found = resolve.for_run(settings, None)
    assert found.dtype == "float32"
    assert found.values["bf16"] is False
    assert settings.with_values(**found.values)["model_init_kwargs"] == {}
    again = run.read("sft", recipes.load("sft"), [*words, "--dtype", "bfloat16"])
    with pytest.raises(UserError, match="dtype is 'float32' here, and `dtype` is 'bfloat16'"):
        resolve.for_run(again, None)


def test_a_loop_of_one_s_own_takes_it(model_dir, tmp_path: Path) -> None:
    model = QLoRAPlugin().load(str(model_dir("llama")), dtype=torch.float32)
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_sizes_that_are_given_are_not_checked_against_those_of_the_checkpoint(
    model_dir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_dir("llama"), base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    layers, last = config["num_hidden_layers"], f"layers.{config['num_hidden_layers'] - 1}.self_attn.q_proj"
    (base / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": layers - 1}), encoding="utf-8"
    )
    monkeypatch.setattr(loading, "_LONG", 1)  # as for a base of many weights
    plugin = QLoRAPlugin(dtype="float32", lora_target_modules=[last, "k_proj"])
    model = plugin.load(str(base), num_hidden_layers=layers)
    assert model.get_submodule(f"base_model.model.model.{last}").lora_A
    (base / "model.safetensors").unlink()  # refused before weights are read
    with pytest.raises(UserError, match="matches no layer"):
        plugin.load(str(base), attn_implementation="eager")
