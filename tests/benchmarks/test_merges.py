"""The comparison of merges runs, and finds this project's the closest to what was trained."""

from collections.abc import Callable
from pathlib import Path

from halfbyte.cli import main
from halfbyte.export import compared
from tests import tiny
from tests.benchmarks import merges
from tests.checkpoint.runs import options


def test_every_way_is_measured(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows", tiny.conversations(16))
    given = {"eval_strategy": "steps", "eval_steps": "6", "save_strategy": "no", "learning_rate": "2e-2"}
    assert main(["sft", *options(model_dir("llama"), data, tmp_path / "run", **given)]) == 0
    source, found = merges.compare(tmp_path / "run")
    assert source == "rows, split test"
    assert list(found) == [compared.TRAINED, *merges.WAYS]
    closest, *others = (found[name].error for name in merges.WAYS)
    assert 0 < closest < min(others)
