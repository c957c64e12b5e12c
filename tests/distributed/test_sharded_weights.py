"""Adapters that are not supported on a sharded base are refused, fresh or loaded; shards and whole tensors."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte import QLoRAPlugin
from halfbyte.distributed import Strategy, check_adapters, check_experts, fsdp2, launcher
from halfbyte.errors import UserError

FSDP2, ZERO3 = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
ROWS, DORA = {"rows": True, "dora": False}, {"rows": False, "dora": True}


@pytest.mark.parametrize(
    ("requested", "made", "named"),
    [
        (FSDP2, ROWS, r"additional_special_tokens: .*launch/ddp\.yaml"),
        (ZERO3, ROWS, r"additional_special_tokens: .*launch/ddp\.yaml"),
        (ZERO3, DORA, r"use_dora: .*launch/fsdp2\.yaml"),
    ],
)
def test_wrong_adapters_are_refused(
    monkeypatch: pytest.MonkeyPatch, requested: str, made: dict[str, bool], named: str
) -> None:
    check_adapters(**made)
    monkeypatch.setenv(requested, "true")
    check_adapters(rows=False, dora=False)
    with pytest.raises(UserError, match=named):
        check_adapters(**made)


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
        check_adapters(**ROWS)


def test_dora_is_right_under_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FSDP2, "true")
    check_adapters(**DORA)


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


@pytest.mark.parametrize(
    ("architecture", "options", "named"),
    [
        ("qwen3_moe", {}, "model_name_or_path: experts in 4 bits are not supported under DeepSpeed"),
        ("llama", {"lora_target_modules": ["q_prj"]}, "lora_target_modules: 'q_prj' matches no layer"),
        ("llama", {"use_dora": True}, "use_dora: true fails under DeepSpeed"),
    ],
    ids=["experts", "a target", "dora"],
)
def test_what_the_configuration_decides_is_refused_before_weights_are_read(
    model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    options: dict[str, Any],
    named: str,
) -> None:
    """There are none here, as before a download."""
    shutil.copy(model_dir(architecture) / "config.json", tmp_path)
    monkeypatch.setenv(ZERO3, "true")
    monkeypatch.setattr("halfbyte.distributed.strategy_in_use", lambda **_: Strategy("zero3", 1, "cpu"))
    with pytest.raises(UserError, match=named):
        QLoRAPlugin(dtype="float32", **options).load(str(tmp_path))
