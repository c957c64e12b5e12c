"""Optimizers: paged on CUDA, a named equivalent elsewhere, every name upstream knows."""

import pytest
import torch
from transformers.training_args import OptimizerNames

from halfbyte import optimizers


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ("paged_adamw_32bit", "adamw_torch"),
        ("paged_adamw_8bit", "adamw_8bit"),
        ("paged_lion_8bit", "lion_8bit"),
        ("paged_ademamix_32bit", "ademamix"),
    ],
)
def test_paged_optimizers_are_replaced_off_cuda_and_said(asked: str, used: str) -> None:
    name, line = optimizers.resolve(asked, "cpu")
    assert name == used
    assert asked in line
    assert used in line
    assert optimizers.resolve(asked, "cuda") == (asked, None)


def test_every_other_upstream_name_is_left_alone() -> None:
    for name in OptimizerNames:
        used, line = optimizers.resolve(name.value, "cpu")
        assert OptimizerNames(used)
        assert (line is None) == (not name.value.startswith("paged_"))


def test_create_trains_what_requires_grad() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[0].requires_grad_(False)
    optimizer = optimizers.create(model, lr=1e-2)
    frozen = model[0].weight.clone()
    before = model[1].weight.clone()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[1].weight, before)
