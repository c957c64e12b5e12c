"""A run that continues an adapter is planned as it trains: with the adapter's own parameters and its reference."""

import json
from pathlib import Path

import pytest

from halfbyte.cli import main
from tests.plan.conftest import Planned


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("dpo", ()),
        ("kto", ()),
        ("dpo", ("--additional_special_tokens=<new>",)),
        pytest.param("dpo", ("--use_dora",), marks=pytest.mark.faults),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_continued_adapter_is_planned_with_its_reference(
    given,
    planned: Planned,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    more: tuple[str, ...],
) -> None:
    """TRL adds a frozen copy of the adapter to the model, of which a plan builds several trainers."""
    from halfbyte.data.sample import Sample
    from halfbyte.plan import plan

    adapter = tmp_path / "adapter"
    made = ("--lora_r=4", "--max_steps=1", f"--output_dir={adapter}")
    assert main(["sft", *given("sft"), *more, *made]) == 0
    words = (*given(recipe), f"--adapter_name_or_path={adapter}")
    monkeypatch.setattr(plan, "Sample", lambda rows=10, longest=0: Sample(rows=rows, longest=longest))
    found = planned(recipe, *words)
    assert found["data"]["read"] == 10
    assert main(["plan", recipe, *words, "--preview=2"]) == 0
    assert main([recipe, *words, f"--output_dir={tmp_path / 'run'}"]) == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["memory"] == told["memory"]["predicted"]


@pytest.mark.faults  # for its seconds
def test_it_is_probed(given, planned: Planned, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    assert main(["sft", *given("sft"), "--max_steps=1", f"--output_dir={adapter}"]) == 0
    found = planned("dpo", *given("dpo"), f"--adapter_name_or_path={adapter}", "--probe")
    assert found["tokens_per_second"] > 0


def test_an_adapter_of_another_model_is_refused(given, tmp_path: Path, capsys) -> None:
    adapter = tmp_path / "adapter"
    assert main(["sft", *given("sft"), "--max_steps=1", f"--output_dir={adapter}"]) == 0
    file = adapter / "adapter_config.json"
    written = json.loads(file.read_text())
    written["target_modules"] = [each for each in written["target_modules"] if "q_proj" not in each]
    file.write_text(json.dumps(written))
    capsys.readouterr()
    assert main(["plan", "dpo", *given("dpo"), f"--adapter_name_or_path={adapter}"]) == 2
    assert "the adapter does not match this base" in capsys.readouterr().err
