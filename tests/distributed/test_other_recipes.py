"""KTO and reward models over a sharded base take the steps of one process; a reward model's head is saved whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed import sharded


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
@pytest.mark.parametrize("recipe", ["reward", "kto"])
def test_a_sharded_base_trains_as_a_whole_one(
    tmp_path: Path, model_dir: Callable[..., Path], recipe: str, strategy: str
) -> None:
    # The KL term of KTO's loss depends on how rows are batched.
    kto = {"loss_type": "apo_zero_unpaired"} if recipe == "kto" else {}
    runs = []
    for processes in (1, 2):
        (root := tmp_path / f"{processes}").mkdir()
        options = {"model_name_or_path": str(model_dir("llama")), **kto}
        runs.append(sharded.train(root, recipe, strategy, processes, options))
    sharded.assert_equal(*runs)
    if recipe == "reward":
        head = runs[1].adapter["base_model.model.score.weight"]
        assert (head.shape, head.dtype) == ((1, 64), torch.float32)
