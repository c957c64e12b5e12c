import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from halfbyte.cli import main
from halfbyte.tracking import RunRecord
from halfbyte.tracking.card import model_card
from tests import tiny
from tests.tracking.conftest import CANARY, CONFIG


def _record(directory: Path, **config: object) -> RunRecord:
    record = RunRecord(directory / "my-run", "sft")
    record.update(
        config={**CONFIG, **config},
        steps=30,
        files={"adapter_model.safetensors": {}},
        status="completed",
        metrics={"before": {"eval_loss": 2.5}, "eval": {"eval_loss": 1.25, "eval_runtime": 3.0}},
    )
    return record


def _code(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def test_metadata_is_what_the_hub_reads(tmp_path: Path) -> None:
    card = ModelCard(model_card(_record(tmp_path, model_name_or_path="Qwen/Qwen3-8B")))
    assert card.data.base_model == "Qwen/Qwen3-8B"
    assert card.data.library_name == "peft"
    assert card.data.datasets == ["somebody/text"]
    assert {"sft", "qlora", "trl"} <= set(card.data.tags)
    assert card.data.license is None


def test_no_secret_and_no_path_of_this_machine(tmp_path: Path) -> None:
    card = model_card(_record(tmp_path, dataset_name=str(tmp_path / "rows.jsonl")))
    assert CANARY not in card
    assert "/home/somebody" not in card
    assert str(tmp_path) not in card
    assert "`tiny-llama`" in card
    assert "`rows.jsonl`" in card
    assert ModelCard(card).data.base_model is None


def test_results_and_settings(tmp_path: Path) -> None:
    card = model_card(_record(tmp_path))
    assert "| eval_loss | 2.5 | 1.25 |" in card
    assert "eval_runtime" not in card
    assert "| learning_rate | 0.0002 |" in card


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("use_peft", [True, False])
def test_the_code_is_python(tmp_path: Path, load_in_4bit: bool, use_peft: bool) -> None:
    code = _code(model_card(_record(tmp_path, load_in_4bit=load_in_4bit, use_peft=use_peft)))
    compile(code, "README.md", "exec")
    assert ("PeftModel" in code) is use_peft
    assert ("BitsAndBytesConfig" in code) is (load_in_4bit and use_peft)


def test_a_full_parameter_run_is_no_adapter(tmp_path: Path) -> None:
    card = ModelCard(model_card(_record(tmp_path, use_peft=False, load_in_4bit=False)))
    assert card.data.library_name == "transformers"


def test_a_hub_id_is_loaded_from_the_hub_and_a_path_from_where_the_card_lies(tmp_path: Path) -> None:
    here = _code(model_card(_record(tmp_path)))
    assert 'PeftModel.from_pretrained(model, ".")' in here
    assert 'from_pretrained("path/to/tiny-llama", ' in here
    pushed = _code(model_card(_record(tmp_path, model_name_or_path="Qwen/Qwen3-8B"), where="me/tuned"))
    assert 'PeftModel.from_pretrained(model, "me/tuned")' in pushed
    assert 'from_pretrained("Qwen/Qwen3-8B", ' in pushed


def test_an_interrupted_run_shows_its_newest_checkpoint_or_nothing(tmp_path: Path) -> None:
    record = _record(tmp_path)
    record._values.pop("files")
    record.update(status="interrupted", checkpoints=["checkpoint-20", "checkpoint-10"])
    card = model_card(record)
    assert "30 steps, interrupted." in card
    assert 'PeftModel.from_pretrained(model, "./checkpoint-20")' in _code(card)
    record.update(checkpoints=[])
    assert "```" not in model_card(record)
    assert "The run has saved no weights." in model_card(record)


def test_no_secret_in_the_title_or_a_name(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / ("hf_" + CANARY * 4), "sft")
    record.update(config={"dataset_name": f"https://{CANARY}@host/rows.jsonl"})
    assert CANARY not in model_card(record)


@pytest.mark.parametrize("place", ["final", "checkpoint"])
def test_the_code_loads_what_was_trained(
    tmp_path: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(8))
    base, output = model_dir("llama"), tmp_path / "run"
    options = {
        **{"--model_name_or_path": str(base), "--dataset_name": rows, "--output_dir": str(output)},
        **{"--max_steps": "1", "--save_steps": "1", "--report_to": "none", "--dtype": "float32"},
    }
    assert main(["sft", *(word for pair in options.items() for word in pair)]) == 0
    card = (output / "README.md").read_text()
    if place == "checkpoint":
        record = RunRecord(output, "sft")
        record.update(
            **{k: v for k, v in json.loads((output / "run.json").read_text()).items() if k != "files"}
        )
        card = model_card(record)
        (output / "adapter_model.safetensors").unlink()
    code = _code(card).replace(f"path/to/{base.name}", str(base))
    monkeypatch.chdir(output)
    found: dict[str, object] = {}
    exec(code, found)
    trained = load_file(
        output / ("checkpoint-1" if place == "checkpoint" else ".") / "adapter_model.safetensors"
    )
    loaded = dict(found["model"].named_parameters())  # type: ignore[attr-defined]
    for name, weight in trained.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")].cpu(), weight)
