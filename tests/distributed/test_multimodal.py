"""Two processes train the language model of a multimodal checkpoint as one does."""

from pathlib import Path

import pytest

from tests import architectures
from tests.distributed import sharded
from tests.distributed.conftest import assert_equal_runs


@pytest.mark.distributed
def test_two_processes_are_one(train, tmp_path: Path) -> None:
    base = architectures.save(tmp_path / "base", "qwen3_vl")
    one, two = (train("sft", processes=processes, base=base) for processes in (1, 2))
    assert_equal_runs(two, one, 2)
    assert two.record["base"]["not_loaded"] == ["model.visual"]


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_a_sharded_language_model_trains_as_a_whole_one(tmp_path: Path, strategy: str) -> None:
    base = architectures.save(tmp_path / "base", "mistral3")
    runs = []
    for count in (1, 2):
        (root := tmp_path / f"{count}").mkdir()
        runs.append(sharded.train(root, "sft", strategy, count, {"model_name_or_path": base}))
    sharded.assert_equal(*runs)
