from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from halfbyte.tracking import RunRecord
from halfbyte.tracking.card import model_card
from tests.tracking.conftest import CANARY, CONFIG


def _record(directory: Path, **config: object) -> RunRecord:
    record = RunRecord(directory / "my-run", "sft")
    record.update(
        config={**CONFIG, **config},
        steps=30,
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
