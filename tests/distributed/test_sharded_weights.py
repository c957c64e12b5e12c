"""Adapters that are not supported on a sharded base are refused, fresh or loaded; shards and whole tensors."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig

from halfbyte import QLoRAPlugin
from halfbyte.distributed import Strategy, check_adapters, check_experts, fsdp2, launcher
from halfbyte.errors import UserError

FSDP2, ZERO3 = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
ROWS, DORA = LoraConfig(trainable_token_indices=[7]), LoraConfig(use_dora=True)


@pytest.mark.parametrize(
    ("requested", "config", "named"),
    [
        (FSDP2, ROWS, r"additional_special_tokens: .*launch/ddp\.yaml"),
        (ZERO3, ROWS, r"additional_special_tokens: .*launch/ddp\.yaml"),
        (ZERO3, DORA, r"use_dora: .*launch/fsdp2\.yaml"),
    ],
)
def test_wrong_adapters_are_refused(
    monkeypatch: pytest.MonkeyPatch, requested: str, config: LoraConfig, named: str
) -> None:
    check_adapters([config])
    monkeypatch.setenv(requested, "true")
    check_adapters([LoraConfig()])
    with pytest.raises(UserError, match=named):
        check_adapters([LoraConfig(), config])


def test_experts_are_refused_under_zero3_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = ["model.layers.0.mlp.experts.down_proj"]
    check_experts(stacks)
    monkeypatch.setenv(FSDP2, "true")
    check_experts(stacks)
    monkeypatch.setenv(ZERO3, "true")
    check_experts([])
    with pytest.raises(UserError, match=r"model_name_or_path: experts in 4 bits .*launch/fsdp2\.yaml"):
        check_experts(stacks)


def test_the_environment_is_looked_up_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Dataset.map` by several processes puts a copy in the place of ``os.environ`` (datasets 5.2)."""
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    monkeypatch.setitem(os.environ, FSDP2, "true")
    assert fsdp2.requested()
    assert launcher.requested().strategy.startswith("fsdp")
    with pytest.raises(UserError):
        check_adapters([ROWS])


def test_dora_is_right_under_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FSDP2, "true")
    check_adapters([DORA])


def test_a_loaded_adapter_is_checked_too(
    model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(model_dir("llama"))
    QLoRAPlugin(dtype="float32").load(base, added_token_ids=[7]).save_pretrained(tmp_path / "adapter")
    monkeypatch.setenv(FSDP2, "true")
    # One process cannot be sharded; what is in use is compared with the request before an adapter is.
    monkeypatch.setattr("halfbyte.distributed.strategy_in_use", lambda **_: Strategy("fsdp2", 1, "cpu"))
    with pytest.raises(UserError, match="additional_special_tokens"):
        QLoRAPlugin(dtype="float32").load(str(tmp_path / "adapter"))
