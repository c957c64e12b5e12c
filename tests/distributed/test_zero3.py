"""DeepSpeed ZeRO-3 for 4-bit models: what is refused, float32 adapters, and resumes. See test_matrix.py too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.distributed import strategy, zero3
from halfbyte.errors import UserError
from tests import packages
from tests.distributed import sharded
from tests.distributed.optimizers import ENTRY_POINTS

ModelDir = Callable[..., Path]
REQUESTED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero3.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"halfbyte\[deepspeed\]"):
        strategy.refuse_unsupported(REQUESTED)


@pytest.mark.parametrize(
    ("dtype", "options", "named"),
    [
        ("bfloat16", {"bf16": True, "fp16": False}, "bf16: false"),
        ("float32", {"bf16": False, "fp16": True}, "fp16: false"),
        ("float16", {"bf16": False, "fp16": False}, "dtype: float32"),
    ],
)
def test_deepspeed_must_not_round_the_adapters(dtype: str, options: dict[str, bool], named: str) -> None:
    zero3.refuse_precision("bfloat16", bf16=False, fp16=False)
    with pytest.raises(UserError, match=named) as error:
        zero3.refuse_precision(dtype, **options)
    assert error.value.option == next((name for name, on in options.items() if on), "dtype")


def test_loraplus_is_refused() -> None:
    zero3.refuse_loraplus(None)
    with pytest.raises(UserError, match=r"loraplus_lr_ratio.*launch/fsdp2\.yaml"):
        zero3.refuse_loraplus(16.0)


@pytest.mark.distributed
def test_adapters_stay_float32_over_a_bfloat16_base(tmp_path: Path, model_dir: ModelDir) -> None:
    options = {"model_name_or_path": str(model_dir("llama")), "dtype": "bfloat16"}
    weights = sharded.train(tmp_path, "sft", "zero3", 2, options).adapter.values()
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in weights)


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", [None, "paged_adamw_32bit"])
def test_a_resumed_run_is_bitwise_the_whole_one(
    tmp_path: Path, model_dir: ModelDir, optimizer: str | None
) -> None:
    """With dropout; the bitsandbytes optimizer in a recipe of its own, since off CUDA halfbyte trains without."""
    site = packages.write(tmp_path / "site", "sharded", ENTRY_POINTS)
    options: dict[str, Any] = {
        "model_name_or_path": str(model_dir("llama")),
        "lora_dropout": 0.1,
        "save_strategy": "steps",
        "save_steps": 3,
        "bitsandbytes_optimizer": optimizer,
    }
    runs: list[sharded.Finished] = []
    for name in ("whole", "resumed"):
        (root := tmp_path / name).mkdir()
        if runs:
            options |= sharded.resumed(root, runs[0], 3)
        runs.append(sharded.train(root, "sharded-sft", "zero3", 2, options, PYTHONPATH=str(site)))
    sharded.assert_resumed(*runs)


@pytest.mark.distributed
def test_a_bitsandbytes_optimizer_steps_as_in_one_process(tmp_path: Path, model_dir: ModelDir) -> None:
    site = packages.write(tmp_path / "site", "sharded", ENTRY_POINTS)
    options = {
        "model_name_or_path": str(model_dir("llama")),
        "bitsandbytes_optimizer": "paged_adamw_32bit",
    }
    runs = []
    for processes in (1, 2):
        (root := tmp_path / f"{processes}").mkdir()
        runs.append(sharded.train(root, "sharded-sft", "zero3", processes, options, PYTHONPATH=str(site)))
    sharded.assert_equal(*runs)
