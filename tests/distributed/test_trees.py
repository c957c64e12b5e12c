"""Pairs are trees on all ranks or on none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import launch

pytestmark = pytest.mark.distributed


def test_a_probe_that_fails_on_one_rank_pads_the_pairs_of_all(
    tmp_path: Path, model_dir: Callable[..., Path]
) -> None:
    words = (str(model_dir("llama")), str(tmp_path / "run"))
    done = launch.accelerate(*words, module="tests.distributed.one_fails")
    told = [line.removeprefix("told ") for line in done.stdout.splitlines() if line.startswith("told ")]
    assert told, done.stderr[-4000:]
    reason = "LlamaForCausalLM computes other values on a pair than on its sides"
    padded = {"collator": "DataCollatorForPreference", "attention": "sdpa", "batches": reason}
    assert json.loads(told[0]) == [padded, padded]
