"""Every recipe on every number of processes equals one process, to 1e-5 in losses and in adapters."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import launch, tiny
from tests.distributed.conftest import Outcome, assert_equal_runs

Train = Callable[..., Outcome]
CELLS = [
    pytest.param(recipe, processes, marks=() if quick else pytest.mark.distributed)
    for processes in (2, 3)
    for recipe in ("sft", "dpo")
    for quick in ((recipe, processes) == ("sft", 2),)
]


@pytest.fixture(scope="module")
def dpo_from_sft(train: Train, reference: Callable[[str], Outcome]) -> Outcome:
    return train("dpo", processes=1, adapter=reference("sft").output)


@pytest.mark.parametrize(("recipe", "processes"), CELLS)
def test_fresh_adapters(
    train: Train, reference: Callable[[str], Outcome], recipe: str, processes: int
) -> None:
    assert_equal_runs(train(recipe, processes=processes), reference(recipe), processes)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 3])
def test_dpo_from_an_sft_adapter(
    train: Train, reference: Callable[[str], Outcome], dpo_from_sft: Outcome, processes: int
) -> None:
    run = train("dpo", processes=processes, adapter=reference("sft").output)
    assert run.losses[0] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert_equal_runs(run, dpo_from_sft, processes)


@pytest.mark.distributed
def test_the_shipped_recipe_from_a_trl_yaml(tmp_path: Path, model_dir) -> None:
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(60))
    output = tmp_path / "run"
    settings = {
        "model_name_or_path": model_dir("llama"),
        "dataset_name": rows,
        "output_dir": output,
        "learning_rate": "2.0e-4",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": "true",
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "use_peft": "true",
        "lora_r": 16,
        "lora_alpha": 32,
        "report_to": "none",
        "dtype": "float32",
    }
    config = tmp_path / "sft.yaml"
    config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    done = launch.accelerate("sft", "--config", str(config), "--max_steps", "20")
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads((output / "run.json").read_text())
    assert (told["strategy"]["name"], told["strategy"]["world_size"]) == ("ddp", 2)
    assert told["steps"] == 20
    assert len(told["peak_memory_bytes"]) == 2
    assert told["metrics"]["eval"]["step"] == 20
