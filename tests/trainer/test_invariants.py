"""Ranks that stop agreeing are stopped, and the first thing they differ in is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.trainer.invariants import checksums, first_difference
from tests import packages, tiny
from tests.distributed import sharded
from tests.distributed.divergence import ENTRY_POINTS


def test_a_checksum_sees_one_bit_and_the_order_of_values() -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    before = checksums(model)
    assert before.keys() == {"weight"}
    assert checksums(model) == before
    with torch.no_grad():
        model.weight[1, 1] = torch.nextafter(model.weight[1, 1], torch.tensor(9.0))
    moved = checksums(model)
    assert moved != before
    with torch.no_grad():
        model.weight.copy_(model.weight.flip(0))
    assert checksums(model) != moved
    assert checksums(torch.nn.Linear(3, 2).bfloat16().requires_grad_(False)) == {}


def test_the_first_difference_is_named_with_every_ranks_value() -> None:
    same: dict[str, Any] = {"the step": 3, "a": 1, "b": 2}
    assert first_difference([same, same]) is None
    assert (
        first_difference([same, {**same, "b": 5, "a": 4}, same])
        == "a: rank 0 has 1, rank 1 has 4, rank 2 has 1"
    )
    assert first_difference([same, {"the step": 3}]) == "a: rank 0 has 1, rank 1 has None"


CASES = {
    "weights": (
        "after step 2 the ranks differ in base_model.model.model.layers.0.self_attn.q_proj.lora_A",
        2,
    ),
    "labels": ("after step 1 the ranks differ in the number of labels", 1),
}


@pytest.mark.distributed
@pytest.mark.parametrize("what", CASES)
def test_a_rank_that_differs_stops_the_run(tmp_path: Path, model_dir: Callable[..., Path], what: str) -> None:
    message, steps = CASES[what]
    site = packages.write(tmp_path / "site", "diverging", ENTRY_POINTS)
    rows = tiny.write_rows(tmp_path / "rows", tiny.texts(24))
    options = {
        "model_name_or_path": str(model_dir("llama")),
        "dataset_name": rows,
        "output_dir": str(tmp_path / "run"),
        "max_steps": "6",
        "logging_steps": "1",
        "report_to": "none",
        "dtype": "float32",
        "diverging": what,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    done = sharded.start("cpu", 2, "diverging-sft", *words, PYTHONPATH=str(site))
    assert done.returncode != 0
    assert message in done.stderr
    assert "rank 1 has" in done.stderr
    assert f"step {steps + 1}/6" not in done.stdout
    assert '"status": "failed"' in (tmp_path / "run" / "run.json").read_text()
