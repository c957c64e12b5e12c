"""The gradient is the mean over the labels of the global batch, however unequally the ranks share them.

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

HALF = sharded.GLOBAL_BATCH // 2
# The rows of rank 0 and those of rank 1, as a sequential sampler deals them: few labels, and many.
SHORT = [{"prompt": tiny.text(n), "completion": " red"} for n in range(HALF)]
LONG = [
    {"prompt": tiny.text(n), "completion": " " + " ".join(tiny.text(n + m) for m in range(8))}
    for n in range(HALF)
]


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory, model_dir: Callable[..., Path]) -> Callable[..., Any]:
    """``step("cpu", 2, rows)``: the adapter after one step over ``rows`` as one global batch."""

    def run(strategy: str, processes: int, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        root = tmp_path_factory.mktemp(f"{strategy}-{processes}")
        options = {
            "model_name_or_path": str(model_dir("llama")),
            "dataset_name": tiny.write_rows(root / "unequal", [*rows, *rows], held_out=len(rows)),
            "per_device_train_batch_size": len(rows) // processes,
            "train_sampling_strategy": "sequential",
            **sharded.ONE_DESCENT,
        }
        return sharded.train(root, "sft", strategy, processes, options).adapter

    return run


@pytest.fixture(scope="module")
def one_process(step: Callable[..., Any]) -> dict[str, torch.Tensor]:
    return step("", 1, [*SHORT, *LONG])


@pytest.mark.parametrize("strategy", ["cpu", "fsdp2", "zero3"])
def test_every_label_weighs_the_same(
    step: Callable[..., Any], one_process: dict[str, torch.Tensor], strategy: str
) -> None:
    assert sharded.furthest(step(strategy, 2, [*SHORT, *LONG]), one_process) <= 1e-6


def test_the_mean_of_the_ranks_means_is_another_gradient(
    step: Callable[..., Any], one_process: dict[str, torch.Tensor]
) -> None:
    """What the test above would let through if its rows were not unequal."""
    short, long = step("", 1, SHORT), step("", 1, LONG)
    averaged = {name: (short[name] + long[name]) / 2 for name in one_process}
    assert sharded.furthest(averaged, one_process) > 1e-3
