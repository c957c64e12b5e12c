"""An adapter's earlier runs: their facts must be this run's, and their chain is copied into run.json and the card."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halfbyte import QLoRAPlugin, adapters
from halfbyte.adapters import lineage
from halfbyte.cli import main
from halfbyte.errors import UserError
from halfbyte.files import digest
from tests import tiny
from tests.checkpoint.runs import options, run

ModelDir = Callable[..., Path]
SHORT = {"max_steps": "2", "save_steps": "1", "eval_strategy": "no"}


def record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.json").read_text())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("rows")
    made = {"sft": tiny.conversations, "dpo": tiny.preferences}
    return {name: tiny.write_rows(root / name, make(12)) for name, make in made.items()}


@pytest.fixture(scope="module")
def finished(model_dir: ModelDir, rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SFT run of two steps."""
    output = tmp_path_factory.mktemp("runs") / "sft"
    assert run("sft", options(model_dir("llama"), rows["sft"], output, **SHORT)) == 0
    return output


@pytest.fixture
def sft(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "sft"))


def start(adapter: Path, data: str, output: Path, *more: str, recipe: str = "dpo") -> int:
    words = options(Path("model"), data, output, **SHORT)[2:]
    return main([recipe, *words, "--adapter_name_or_path", str(adapter), *more])


def test_the_chain_is_copied_from_run_to_run(
    sft: Path, rows: dict[str, str], model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = sft, tmp_path / "dpo", tmp_path / "orpo"
    before = record(first)
    assert before["lineage"] == []
    assert start(first, rows["dpo"], second) == 0
    assert f"lineage: sft {before['run_id']} -> this run" in capsys.readouterr().out
    entry = {
        "name": str(first),
        "recipe": "sft",
        "run_id": before["run_id"],
        "adapter_sha256": digest(first / "adapter_model.safetensors"),
        "base": {key: before["base"][key] for key in ("name", "revision", "sha")},
        "steps": 2,
    }
    assert record(second)["lineage"] == [entry]
    shutil.rmtree(first)
    assert start(second, rows["dpo"], third, recipe="orpo") == 0
    found = record(third)["lineage"]
    assert found[0] == entry
    assert [(each["recipe"], each["name"], each["steps"]) for each in found[1:]] == [("dpo", str(second), 2)]
    card = (third / "README.md").read_text()
    assert (
        f"| sft | sft | {before['run_id']} | 2 | {model_dir('llama').name} | {entry['adapter_sha256'][:12]} |"
        in card
    )
    assert card.index("| sft | sft |") < card.index("| dpo | dpo |")
    assert str(tmp_path) not in card


def test_a_checkpoint_is_an_adapter_of_its_run(sft: Path, rows: dict[str, str], tmp_path: Path) -> None:
    assert start(sft / "checkpoint-1", rows["dpo"], tmp_path / "dpo") == 0
    (found,) = record(tmp_path / "dpo")["lineage"]
    assert (found["recipe"], found["run_id"], found["steps"]) == ("sft", record(sft)["run_id"], 1)
    moved = Path(shutil.copytree(sft / "checkpoint-1", tmp_path / "elsewhere"))
    (found,) = adapters.chain(str(moved), "elsewhere")
    assert (found["recipe"], found["run_id"], found["steps"]) == (None, record(sft)["run_id"], 1)
    assert found["base"]["sha"] == record(sft)["base"]["sha"]


def test_an_adapter_of_no_run_has_its_weights_and_base(sft_adapter: Path, model_dir: ModelDir) -> None:
    (found,) = adapters.chain(str(sft_adapter), "them/adapter")
    assert found == {
        "name": "them/adapter",
        "recipe": None,
        "run_id": None,
        "adapter_sha256": digest(sft_adapter / "adapter_model.safetensors"),
        "base": {"name": str(model_dir("llama")), "revision": None, "sha": None},
        "steps": None,
    }
    assert adapters.chain(None, None) == []


@pytest.mark.parametrize(
    "written",
    [
        "[]",
        "{",
        '{"lineage": 3, "base": [], "config": "x", "tokenizer": 1}',
        '{"lineage": [1, {"name": {"a": [2]}}]}',
    ],
)
def test_a_run_json_of_any_shape_is_read(sft_adapter: Path, tmp_path: Path, written: str) -> None:
    adapter = Path(shutil.copytree(sft_adapter, tmp_path / "adapter"))
    (adapter / "run.json").write_text(written)
    found = adapters.chain(str(adapter), "x")
    assert all(tuple(each) == lineage._KEYS for each in found)
    QLoRAPlugin(dtype="float32", adapter_name_or_path=str(adapter)).load()


@pytest.mark.parametrize(
    ("given", "option", "words"),
    [
        (("--bnb_4bit_quant_type", "fp4"), "bnb_4bit_quant_type", ("nf4", "fp4")),
        (("--use_bnb_nested_quant", "false"), "use_bnb_nested_quant", ("true", "false")),
        (("--load_in_4bit", "false"), "load_in_4bit", ("true", "false")),
    ],
)
def test_another_quantization_is_refused(
    given: tuple[str, str], option: str, words: tuple[str, str], sft: Path, rows: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert start(sft, rows["dpo"], tmp_path / "dpo", *given) == 2
    said = capsys.readouterr().err
    assert f"--{option}: the adapter {str(sft)!r} was trained on a base with `{option}: {words[0]}`" in said
    assert f"this run has {words[1]}; write `{option}: {words[0]}`" in said
    assert not (tmp_path / "dpo").exists()


def test_a_base_in_16_bits_has_no_quantization_to_agree_on(sft: Path) -> None:
    values = {
        "load_in_4bit": False,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": True,
    }
    (sft / "run.json").write_text(json.dumps({"config": {**values, "use_bnb_nested_quant": False}}))
    lineage.same_quantization(str(sft), values)
    with pytest.raises(UserError, match="with `load_in_4bit: false`, and this run has true"):
        lineage.same_quantization(str(sft), {**values, "load_in_4bit": True})


def changed(sft: Path, change: Callable[[Any], None]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sft)
    change(tokenizer)
    for file in sft.glob("*.jinja"):
        file.unlink()
    tokenizer.save_pretrained(sft)


def test_another_chat_template_is_refused(
    sft: Path, rows: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    then = record(sft)["tokenizer"]["chat_template"]

    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")

    changed(sft, change)
    now = adapters.describe(AutoTokenizer.from_pretrained(sft))["chat_template"]
    assert start(sft, rows["dpo"], tmp_path / "dpo") == 2
    said = capsys.readouterr().err
    assert f"another chat template: sha256 {then[:12]}, and this run has sha256 {now[:12]}" in said
    assert f"--adapter_name_or_path: the adapter {str(sft)!r}" in said


def test_another_tokenizer_is_refused(sft: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.add_tokens(["zebra"])

    changed(sft, change)
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(sft))
    tokenizer = AutoTokenizer.from_pretrained(sft)
    with pytest.raises(
        UserError, match=r"another tokenizer: 320 tokens \(sha256 .{12}\), and this run has 321 tokens"
    ):
        lineage.same_tokenizer(plugin.adapter_name_or_path, tokenizer)


def test_saving_and_loading_leaves_a_tokenizer_as_it_is(sft: Path) -> None:
    assert adapters.describe(AutoTokenizer.from_pretrained(sft)) == record(sft)["tokenizer"]


def test_another_base_of_the_same_name_is_named_by_its_fingerprint(
    sft: Path, rows: dict[str, str], model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = model_dir("llama", seed=1)
    assert start(sft, rows["dpo"], tmp_path / "dpo", "--model_name_or_path", str(other)) == 2
    said = capsys.readouterr().err
    assert f"{str(model_dir('llama'))!r} (main, sha256 {record(sft)['base']['sha'][:12]})" in said
    assert f"not on {str(other)!r} (main, sha256 " in said
