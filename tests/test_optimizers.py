"""Optimizers: paged on CUDA, a named equivalent elsewhere, every name upstream knows."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin, optimizers
from halfbyte.errors import UserError
from tests import tiny


@pytest.mark.parametrize(
    ("requested", "used"),
    [
        ("paged_adamw_32bit", "adamw_torch"),
        ("paged_adamw_8bit", "adamw_8bit"),
        ("paged_lion_8bit", "lion_8bit"),
        ("paged_ademamix_32bit", "ademamix"),
    ],
)
def test_paged_optimizers_are_replaced_off_cuda_and_printed(requested: str, used: str) -> None:
    name, line = optimizers.resolve(requested, "cpu")
    assert name == used
    assert requested in line
    assert used in line
    assert optimizers.resolve(requested, "cuda") == (requested, None)


def test_every_other_upstream_name_is_left_alone() -> None:
    for name in OptimizerNames:
        used, line = optimizers.resolve(name.value, "cpu")
        assert OptimizerNames(used)
        assert (line is None) == (not name.value.startswith("paged_"))


# Optimizers that the packages of pyproject.toml provide on a CPU; the others require a package or a device.
TRAINABLE = [
    *("adamw_torch", "adamw_torch_fused", "adafactor", "ademamix", "sgd", "adagrad", "rmsprop"),
    *("adamw_8bit", "adamw_bnb_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit"),
    *("paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_8bit", "paged_lion_32bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
]


def trainer(model: Path, output: Path, optim: str) -> Trainer:
    args = SFTConfig(
        str(output),
        optim=optim,
        use_cpu=True,
        bf16=False,
        max_steps=1,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list(tiny.texts(8))
    return QLoRAPlugin(dtype="float32").trainer(SFTTrainer, model=str(model), args=args, train_dataset=rows)


@pytest.mark.parametrize("optim", TRAINABLE)
def test_a_step_moves_every_b(model_dir: Callable[..., Path], tmp_path: Path, optim: str) -> None:
    run = trainer(model_dir("llama"), tmp_path, optim)
    run.train()
    moved = {n: bool(p.abs().max() > 0) for n, p in run.model.named_parameters() if "lora_B" in n}
    assert moved
    assert all(moved.values())


def test_an_optimizer_whose_package_is_missing_is_a_users_error(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"optim: galore_adamw: .*galore_torch"):
        trainer(model_dir("llama"), tmp_path, "galore_adamw")


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
