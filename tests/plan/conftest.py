"""Small data sets for the recipes, and their plans as JSON."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.cli import main
from tests import tiny

ROWS = {"sft": tiny.conversations, "dpo": tiny.preferences, "kto": tiny.labelled, "pretrain": tiny.texts}
OPTIONS = (
    "--per_device_train_batch_size=2",
    "--num_train_epochs=1",
    "--report_to=none",
    "--save_strategy=no",
    "--dtype=float32",
    "--max_length=64",
)
Planned = Callable[..., dict]


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Planned:
    """``planned(recipe, *words)``: the plan as JSON; its exit code is that of its verdict."""

    def plan(recipe: str, *words: str) -> dict:
        capsys.readouterr()
        code = main(["plan", recipe, "--json", *words])
        found = json.loads(capsys.readouterr().out)
        assert code == (found["verdict"] == "does not fit")
        return found

    return plan


@pytest.fixture
def given(model_dir, tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    def words(recipe: str, arch: str = "llama", rows: int = 20) -> tuple[str, ...]:
        data = tiny.write_rows(tmp_path / recipe, ROWS[recipe](rows))
        return (f"--model_name_or_path={model_dir(arch)}", f"--dataset_name={data}", *OPTIONS)

    return words
