"""What the benchmarks leave out of TRL's grid, and how they count."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tests import plain_trl, tiny
from tests.benchmarks import report
from tests.benchmarks.variants import Step
from tests.benchmarks.workload import Case


def test_selective_checkpointing_still_does_not_train(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """When this fails, TRL's selective checkpointing works: put it into `variants.grid`."""
    base = model_dir("llama")
    model = get_peft_model(plain_trl.base(base), LoraConfig(r=4, task_type="CAUSAL_LM"))
    options = {"max_steps": 1, "gradient_checkpointing_kwargs": {"selective": True}}
    trainer = SFTTrainer(
        model=model,
        args=plain_trl.arguments(SFTConfig, tmp_path, **options),
        train_dataset=Dataset.from_list(tiny.texts(12)),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    with pytest.raises(ValueError, match="Unexpected keyword arguments: selective"):
        trainer.train()


def line(name: str, seconds: float, tokens: int, memory: float) -> report.Line:
    return report.Line(name, [Step(1.0, seconds, tokens)] * 3, 0.0, None, memory, "")


def test_ratios_are_per_token_and_targets_are_held_to_them() -> None:
    lines = [
        line("TRL float32, checkpointing", 4.0, 100, 100.0),
        line("halfbyte float32", 2.0, 100, 60.0),
        line("TRL float32, packing", 4.0, 200, 100.0),
    ]
    assert lines[2].times_faster_than(lines[0]) == [2.0] * 3
    assert lines[1].tokens_per_second == 50.0
    text = report.table(report.Result(Case("lognormal"), lines, {"a": 1.0}, "TRL float32, packing"))
    assert "| TRL float32, checkpointing | >= 1.5x | 2.00x | yes |" in text
    assert "| the best TRL options (TRL float32, packing) | >= 1.8x | 1.00x | NO |" in text
    assert "| peak memory of TRL float32, checkpointing | <= 0.5x | 0.60x | NO |" in text
    assert "bfloat16" not in text
