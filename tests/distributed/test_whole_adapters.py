"""Adapters of a sharded model: shards and whole tensors, and what a trainer that mixes in WholeAdapters saves."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer

from halfbyte import QLoRAPlugin
from halfbyte.distributed import fsdp2, is_sharded, local_shard, whole
from halfbyte.trainer.whole_adapters import WholeAdapters
from tests.distributed import fake_ranks

ModelDir = Callable[..., Path]


class Upstream(Trainer):
    """A Trainer that records what it is called with, over a model that is given."""

    def __init__(self, model: Any, *, fsdp: bool, push: bool = False) -> None:
        self.model, self.is_fsdp_enabled, self.is_deepspeed_enabled = model, fsdp, False
        self.args = SimpleNamespace(push_to_hub=push, hub_revision="main")
        self.accelerator = SimpleNamespace(wait_for_everyone=lambda: None)
        self.calls: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.calls.append(f"upstream {output_dir} {_internal_call}")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.calls.append(f"whole {output_dir}")
        self.weights = dict(state_dict or {})

    def push_to_hub(self, **kwargs: Any) -> Any:
        self.calls.append(f"push {kwargs['revision']}")


class Composed(WholeAdapters, Upstream):
    pass


def test_a_shard_and_the_whole_of_a_plain_tensor_are_itself() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    assert local_shard(parameter).data_ptr() == parameter.data_ptr()
    assert not local_shard(parameter).requires_grad
    assert torch.equal(whole(parameter), parameter)
    assert not is_sharded(torch.nn.Linear(2, 2))


def test_a_shard_under_zero3_is_its_flat_piece() -> None:
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_tensor = 0, torch.arange(3.0)  # type: ignore[attr-defined]
    assert torch.equal(local_shard(parameter), torch.arange(3.0))
    module = torch.nn.Module()
    module.register_parameter("weight", parameter)
    assert is_sharded(module)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_shard_under_fsdp2_is_its_rows(model_dir: ModelDir, rank: int) -> None:
    model = QLoRAPlugin(dtype="float32", lora_r=4).load(str(model_dir("llama")))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert not is_sharded(model)
    with fake_ranks.rank_of(3, rank) as mesh:
        fsdp2.prepare(fake_ranks.accelerator(mesh), model)
        assert is_sharded(model)
        for name, parameter in model.named_parameters():
            if name in before:
                assert isinstance(parameter, DTensor)
                chunks = before[name].chunk(3)
                expected = chunks[rank] if rank < len(chunks) else before[name][:0]
                assert torch.equal(local_shard(parameter), expected)


@pytest.mark.parametrize("push", [False, True])
def test_a_sharded_adapter_is_saved_whole(model_dir: ModelDir, push: bool) -> None:
    model = QLoRAPlugin(dtype="float32", lora_r=4).load(str(model_dir("llama")))
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    with fake_ranks.rank_of(3) as mesh:
        fsdp2.prepare(fake_ranks.accelerator(mesh), model)
        trainer = Composed(model, fsdp=True, push=push)
        trainer.save_model("there", _internal_call=True)
        assert trainer.calls == ["whole there"], "a checkpoint pushes nothing"
        trainer.save_model("there")
        assert trainer.calls[1:] == ["whole there", *(["push main"] if push else [])]
        assert {name: weight.shape for name, weight in trainer.weights.items()} == shapes


def test_a_model_that_is_not_sharded_is_saved_by_upstream(model_dir: ModelDir) -> None:
    model = QLoRAPlugin(dtype="float32", lora_r=4).load(str(model_dir("llama")))
    for fsdp, given in ((False, model), (True, model), (True, torch.nn.Linear(2, 2))):
        trainer = Composed(given, fsdp=fsdp)
        trainer.save_model("there", _internal_call=True)
        assert trainer.calls == ["upstream there True"]
