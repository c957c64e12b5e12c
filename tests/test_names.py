"""A base, adapter or template that is not there is refused by name, with the nearest directory; nothing hangs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from trl import SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin, names, run
from halfbyte import recipe as recipes
from halfbyte.errors import UserError

ModelDir = Callable[..., Path]
OFFLINE = r"is no directory and not in the hub's local cache, and HF_HUB_OFFLINE is set"


@pytest.fixture
def here(model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base in ``base`` and one in ``runs/first``."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "runs/first"):
        shutil.copytree(model_dir("llama"), tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("gpt2", "gpt2"),
        ("runs/first", "first"),
        ("base", "base"),
        ("/home/somebody/base", "base"),
        ("~/models/base/", "base"),
        ("../models/base", "base"),
        ("gone/runs/first", "first"),
    ],
)
def test_of_a_path_others_read_the_last_name(here: Path, name: str, shown: str) -> None:
    assert names.public(name) == shown
    assert names.is_local(name) == (name not in ("Qwen/Qwen3-8B", "gpt2"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./bas", r"there is no directory \./bas; did you mean \./base\?"),
        ("./bas/", r"there is no directory \./bas/; did you mean \./base\?"),
        ("bas", rf"'bas' {OFFLINE}; did you mean base\?"),
        ("runs/firs", rf"'runs/firs' {OFFLINE}; did you mean runs/first\?"),
        ("runs/first/checkpoint-1", r"there is no directory runs/first/checkpoint-1$"),
        ("Qwen/Qwen3-8B", rf"'Qwen/Qwen3-8B' {OFFLINE}$"),
        ("../nowhere/base", r"there is no directory \.\./nowhere/base$"),
        ("a name with spaces", rf"'a name with spaces' {OFFLINE}$"),
        ("base/config.json", "base/config.json is a file; name the directory of a model"),
        ("runs", "runs is not a model: it has no config.json"),
    ],
)
def test_a_base_that_is_not_there(here: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"model_name_or_path: {message}"):
        QLoRAPlugin(dtype="float32").load(name)
    with pytest.raises(UserError, match=f"model_name_or_path: {message}"):  # before its tokenizer
        QLoRAPlugin().trainer(SFTTrainer, model=name, args=SFTConfig(str(here / "out"), use_cpu=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./runs/firs", r"there is no directory \./runs/firs; did you mean \./runs/first\?"),
        ("runs/firs", rf"'runs/firs' {OFFLINE}; did you mean runs/first\?"),
        ("base", r"'base' is not an adapter directory: it has no adapter_config.json"),
    ],
)
def test_an_adapter_that_is_not_there(here: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"adapter_name_or_path: {message}"):
        QLoRAPlugin(adapter_name_or_path=name).load("base")


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"]
)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(here: Path, file: str) -> None:
    (here / "base" / file).unlink(missing_ok=True)
    os.mkfifo(here / "base" / file)
    with pytest.raises(UserError, match=rf"base/{file} is not a file"):
        QLoRAPlugin().load("base")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.json", b"null", "is not a JSON object"),
        ("config.json", b"", "is not a JSON object"),
        ("config.json", b"[" * 100_000, "is not a JSON object"),
        (
            "config.json",
            b'{"num_hidden_layers": 1000000000}',
            "names 1,000,000,000 layers, and the weights have",
        ),
        ("config.json", None, "has more than 268,435,456 bytes"),
        ("tokenizer.json", None, "has more than 268,435,456 bytes"),
        ("chat_template.jinja", None, "has more than 268,435,456 bytes"),
        ("model.safetensors", None, "is damaged: "),  # before a terabyte is hashed
        ("model.safetensors", b"\xff" * 8, "is damaged: "),
        ("model.safetensors", b"\2\0\0\0\0\0\0\0{}more", "is damaged: "),
        ("model-2.safetensors", b"", "is damaged: "),
    ],
)
def test_a_file_that_no_model_has_is_named_before_it_is_read(
    here: Path, file: str, content: bytes | None, problem: str
) -> None:
    with (here / "base" / file).open("wb") as written:
        if content is None:
            written.truncate(1 << 40)
        else:
            written.write(content)
    with pytest.raises(UserError, match=rf"^(model_name_or_path: )?base/{file} {problem}"):
        QLoRAPlugin().load("base")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "chat_template.jinja"])
def test_a_directory_in_the_place_of_a_file(here: Path, file: str) -> None:
    (here / "base" / file).unlink(missing_ok=True)
    (here / "base" / file).mkdir()
    with pytest.raises(UserError, match=rf"base/{file} is a directory.*; remove it"):
        QLoRAPlugin().load("base")


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and checkpoint too: a quoted one reaches us as it was written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--output_dir", "~/runs/a", "--resume_from_checkpoint", "~/runs/a/checkpoint-1"]
    settings = run.read("sft", recipes.load("sft"), words)
    assert settings["output_dir"] == str(tmp_path / "runs/a")
    assert settings["resume_from_checkpoint"] == str(tmp_path / "runs/a/checkpoint-1")
