"""What the benchmarks leave out of TRL's grid, which columns they measure, and how they count."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tests import plain_trl, tiny
from tests.benchmarks import overhead, report, steps
from tests.benchmarks.variants import Step, Variant
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


def test_bfloat16_on_both_sides_is_for_information() -> None:
    lines = [
        line("TRL float32, checkpointing", 4.0, 100, 100.0),
        line("halfbyte float32", 2.0, 100, 50.0),
        line("TRL bfloat16, checkpointing", 8.0, 100, 50.0),
        line("TRL bfloat16, no checkpointing", 6.0, 100, 50.0),
        line("halfbyte bfloat16", 3.0, 100, 25.0),
    ]
    text = report.table(report.Result(Case("fixed 512"), lines))
    assert "| TRL bfloat16, no checkpointing (by halfbyte bfloat16) | none | 2.00x | |" in text
    assert "by halfbyte bfloat16" not in report.table(report.Result(Case("fixed 512"), lines[:4]))


def test_the_hopeless_take_one_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken: list[str] = []

    @dataclass
    class Fake:
        variant: Variant
        seconds: float

        def step(self) -> Step:
            taken.append(self.variant.name)
            return Step(1.0, self.seconds, 100)

    fakes = [
        Fake(Variant(name, "float32"), seconds) for name, seconds in (("a", 1.0), ("b", 2.4), ("c", 2.6))
    ]
    monkeypatch.setattr(steps, "start", lambda *_: fakes)
    rates = steps.try_out(Case("any"), [fake.variant for fake in fakes], tmp_path)
    assert rates == {"a": 100.0, "b": 100 / 2.4, "c (one step)": 100 / 2.6}
    assert [taken.count(name) for name in "abc"] == [4, 4, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_columns(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr("tests.benchmarks.variants.native_dtype", lambda: dtype)

    def names(case: Case, *words: str) -> list[str]:
        return [variant.name for variant in steps.columns(case, steps.parse(words))]

    both = [f"TRL {dtype}, checkpointing", f"halfbyte {dtype}"]
    theirs = [*(["TRL bfloat16, checkpointing"] if dtype == "float32" else []), "TRL defaults"]
    assert names(Case("any")) == both + theirs == names(Case("any", threshold=True), "--quick")
    assert names(Case("any", large=True)) == both
    assert set(names(Case("any", threshold=True))) >= {*both, *theirs, f"halfbyte {dtype}, memory_budget min"}
    assert names(Case("any"), "--without-bf16") == ["TRL float32, checkpointing", f"halfbyte {dtype}"]


def test_overhead_says_what_is_missed() -> None:
    found = {"TRL": [{"start": 1.0, "end": 1.0}] * 3, "halfbyte": [{"start": 0.9, "end": 2.0}] * 3}
    text = overhead.table(found)
    assert "| end | 1000 | 2000 | 2.00 | 2.00-2.00 |" in text
    assert text.endswith("is missed at: end.")
