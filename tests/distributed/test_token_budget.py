"""Micro-batches by tokens on several ranks: the gradient of one batch of all rows, and an exact resume.

One step of plain descent with a learning rate of one moves every adapter by its gradient.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.distributed import sharded

pytestmark = pytest.mark.distributed

ROWS = 14


def unequal(recipe: str) -> list[dict[str, Any]]:
    """Rows from short to long."""
    if recipe == "sft":
        return [{"prompt": tiny.text(n), "completion": " " + "red " * (n + 1)} for n in range(ROWS)]
    rows = tiny.preferences(ROWS)
    return [{**row, "chosen": row["chosen"] + " red" * 2 * n} for n, row in enumerate(rows)]


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory, model_dir: Callable[..., Path]) -> Callable[..., Any]:
    """``step("dpo", "cpu", 2, ...)``: a run of one step over all rows."""

    def run(recipe: str, strategy: str, processes: int, **given: Any) -> sharded.Finished:
        root = tmp_path_factory.mktemp(f"{recipe}-{strategy}-{processes}")
        options = {
            "model_name_or_path": str(model_dir("llama")),
            "dataset_name": tiny.write_rows(root / "unequal", [*unequal(recipe), *unequal(recipe)[:4]]),
            **sharded.ONE_DESCENT,
            **given,
        }
        return sharded.train(root, recipe, strategy, processes, options)

    return run


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
@pytest.mark.parametrize("strategy", ["cpu", "fsdp2", "zero3"])
def test_every_row_weighs_the_same(step: Callable[..., Any], recipe: str, strategy: str) -> None:
    whole = step(recipe, "", 1, per_device_train_batch_size=ROWS)
    budget = {"sft": 60, "dpo": 100}[recipe]
    # Many more micro-batches than there are: a step is an epoch.
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 99}
    parts = step(recipe, strategy, 2, max_tokens_per_batch=budget, **given)
    batching = parts.record["batching"]
    assert batching["micro_batches"] % 2 == 0
    assert batching["micro_batches"] > ROWS / 4
    assert parts.logged("rows") == [ROWS]
    assert sharded.furthest(parts.adapter, whole.adapter) <= 1e-6
    assert parts.logged() == pytest.approx(whole.logged(), abs=1e-5)
    assert max(weight.abs().max().item() for weight in parts.adapter.values()) > 1e-3
    assert all(torch.isfinite(weight).all() for weight in parts.adapter.values())
