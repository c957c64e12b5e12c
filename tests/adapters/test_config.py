"""What an adapter's configuration may hold: PEFT's types, and patterns that end."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte import QLoRAPlugin, adapters
from halfbyte.errors import UserError

ModelDir = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    QLoRAPlugin(dtype="float32").load(str(model_dir("llama"))).save_pretrained(directory)
    return directory


def with_config(saved: Path, into: Path, **values: Any) -> str:
    shutil.copytree(saved, into)
    file = into / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return str(into)


WRONG = {
    "r": ["16", 1.5, True, [16], {}],
    "lora_alpha": ["32", [], False, float("inf")],
    "lora_dropout": ["0"],
    "target_modules": [5, {"q_proj": 1}, [1], [["q_proj"]], True],
    "exclude_modules": [5, [None]],
    "modules_to_save": ["lm_head", {"a": 1}, [3]],
    "target_parameters": ["x", [1]],
    "rank_pattern": [["q_proj"], "q_proj", {"q_proj": "8"}, {"q_proj": True}],
    "alpha_pattern": [[1]],
    "use_rslora": ["yes", 1],
    "use_dora": ["no", 0],
    "base_model_name_or_path": [["x"], 3],
    "revision": [3],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_type_is_refused_by_name(saved: Path, tmp_path: Path, name: str) -> None:
    for count, value in enumerate(WRONG[name]):
        adapter = with_config(saved, tmp_path / str(count), **{name: value})
        with pytest.raises(UserError, match=rf"adapter_config.json: {name} must be .*, is "):
            adapters.base_of(adapter)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"3", b"\xff", b'{"r": ', b"[" * 100_000])
def test_what_is_no_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(UserError, match="is not a PEFT adapter configuration"):
        adapters.base_of(str(tmp_path))


@pytest.mark.parametrize("content", [b"[]", b"null", b'{"base": 3}', b"\xff", b"[" * 100_000])
def test_a_run_record_that_is_none_is_passed_over(saved: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(saved, tmp_path / "adapter")
    (tmp_path / "adapter" / "run.json").write_bytes(content)
    assert adapters.revision_of(str(tmp_path / "adapter")) == "main"


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "run.json"])
def test_a_pipe_is_not_waited_for(saved: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(saved, tmp_path / "adapter")
    (tmp_path / "adapter" / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "adapter" / file)
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(tmp_path / "adapter"))
    if file == "run.json":
        plugin.load()  # says nothing, as if it were not there
        return
    with pytest.raises(UserError, match=f"it has no {file}"):
        plugin.load()


SLOW = r"(\w+\.?)+!"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": SLOW}, "target_modules: the pattern .* takes too long"),
        ({"exclude_modules": SLOW}, "exclude_modules: the pattern .* takes too long"),
        ({"rank_pattern": {SLOW: 8}}, "rank_pattern: the pattern .* takes too long"),
        ({"target_modules": "(q_proj"}, "target_modules: the pattern '[(]q_proj' is not a regular expression: missing"),
    ],
)  # fmt: skip
def test_a_pattern_that_does_not_end_is_refused(
    saved: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    adapter = with_config(saved, tmp_path / "adapter", **values)
    begun = time.process_time()
    with pytest.raises(UserError, match=f"adapter_config.json: {message}"):
        QLoRAPlugin(dtype="float32", adapter_name_or_path=adapter).load()
    assert time.process_time() - begun < 30


def test_a_pattern_of_one_s_own_is_bounded_too(model_dir: ModelDir) -> None:
    base = str(model_dir("llama"))
    for pattern, message in ((SLOW, "takes too long"), ("*_proj", "is not a regular expression")):
        with pytest.raises(UserError, match=f"lora_target_modules: the pattern .* {message}"):
            QLoRAPlugin(dtype="float32", lora_target_modules=[pattern]).load(base)
    QLoRAPlugin(dtype="float32", lora_target_modules=[r".*\.[qv]_proj"]).load(base)
