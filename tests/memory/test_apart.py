"""Layers that are not fused whole: what they keep is what is estimated, and keeping it changes no number."""

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import fast, memory
from halfbyte.fast import apart, layer
from halfbyte.fast import experts as fused_experts
from halfbyte.memory import Workload
from halfbyte.memory import model as memory_model
from halfbyte.memory.apart import kept_per_token
from tests import experts
from tests.fast import test_experts, test_families

IDS = test_experts.IDS
LARGE = Workload(tokens=10**6, longest=10**3, optim="adamw_torch")
QUICK = ("qwen3_moe", "gpt_oss")
LONG = ("mixtral", "olmoe", "glm4_moe", "granitemoe", "qwen2_moe", "ernie4_5_moe", "dots1", "minimax_m2")


def make(directory: Path, family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fused model of ``family``, in training."""
    base = experts.load(experts.save(directory, family), dtype)
    base.config.use_cache = False
    model = test_experts.adapted(base)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    report = fast.fuse(model)
    assert report.keeping == len(apart.forwards(model)) > 0
    assert report.level == layer.LEVELS[0]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(each, marks=pytest.mark.faults) for each in LONG)])
def test_what_is_kept_is_what_is_estimated(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = make(tmp_path, family, dtype)
    (forward, *_) = apart.forwards(model)
    forward.level = layer.LEVELS[-1]
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def begin(*_: Any) -> None:
        hooks.__enter__()

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    forward.module.register_forward_pre_hook(begin)
    forward.module.register_forward_hook(lambda *_: hooks.__exit__(None, None, None))
    model(input_ids=IDS)
    estimate = IDS.numel() * kept_per_token(forward.module, model.config, dtype.itemsize)
    assert 1 <= estimate / sum(kept.values()) < 1.25


def test_the_highest_level_computes_experts_once_and_changes_no_number(tmp_path: Path) -> None:
    """Transformers recomputes a layer at the others; a resumed run may have another level."""
    model = make(tmp_path, "qwen3_moe")
    calls, found = 0, []

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for _, module, _ in fused_experts.within(model):
        module.register_forward_pre_hook(count)
    for level in layer.LEVELS:
        for forward in apart.forwards(model):
            forward.level = level
        calls = 0
        found.append(test_experts.gradients(model))
        assert calls == (2 if level == layer.LEVELS[-1] else 4)  # of two layers
    for loss, gradients in found[1:]:
        assert loss == found[0][0]
        assert all(torch.equal(gradients[name], found[0][1][name]) for name in found[0][1])


def test_a_budget_decides(tmp_path: Path) -> None:
    model = make(tmp_path, "qwen3_moe")
    needs = {level: each.total - each.loaded for level, each in memory_model.by_level(model, LARGE).items()}
    assert needs[0] == needs[2] < needs[3]
    for budget, level in (("min", 0), (f"{needs[3] / 10**6 - 1}MB", 2), (f"{needs[3] / 10**6 + 1}MB", 3)):
        choice = memory.choose(model, budget, LARGE)
        assert choice is not None
        assert [choice.level] * 2 == [forward.level for forward in apart.forwards(model)] == [level] * 2


def test_a_layer_with_other_weights_has_no_level() -> None:
    """Apertus has an activation that is not fused, so that what its MLPs keep is not known."""
    model = test_families.make("apertus")
    report = fast.fuse(model)
    assert report.parts == {"attention": 2}
    assert (report.keeping, apart.forwards(model)) == (0, [])
