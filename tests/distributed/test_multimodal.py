"""Two processes train the language model of a multimodal checkpoint as one does."""

from pathlib import Path

import pytest

from tests import architectures
from tests.distributed.conftest import assert_equal_runs


@pytest.mark.distributed
def test_two_processes_are_one(train, tmp_path: Path) -> None:
    base = architectures.save(tmp_path / "base", "qwen2_vl")
    one, two = (train("sft", processes=processes, base=base) for processes in (1, 2))
    assert_equal_runs(two, one, 2)
    assert two.record["base"]["not_loaded"] == ["model.visual"]
