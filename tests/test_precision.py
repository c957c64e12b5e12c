"""``dtype``, ``bf16`` and ``fp16`` agree: what was given rules, and the device's best fills in."""

import pytest
import torch
from trl import DatasetMixtureConfig, SFTConfig

from halfbyte import config, precision, quantization, run
from halfbyte.config import RunArguments
from halfbyte.plugin import QLoRAPlugin

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def decided(monkeypatch: pytest.MonkeyPatch, best: torch.dtype, device: torch.device, *options: str):
    monkeypatch.setattr(quantization, "choose_compute_dtype", lambda *_: best)
    settings = config.read(
        options,
        (RunArguments, SFTConfig, QLoRAPlugin, DatasetMixtureConfig),
        prog="halfbyte sft",
        defaults=run.training_defaults(SFTConfig),
    )
    values: dict = {}
    precision.settle(settings, settings.given.keys(), device, ("no-model", "main"), {}, values)
    settings = settings.with_values(**values)
    return settings["dtype"], settings["bf16"], settings["fp16"]


@pytest.mark.parametrize(
    ("best", "device", "options", "expected"),
    [
        (torch.bfloat16, CUDA, [], ("bfloat16", True, False)),
        (torch.float16, CUDA, [], ("float16", False, True)),  # a T4: half precision with a gradient scaler
        (torch.float32, CPU, [], ("float32", False, False)),
        (torch.bfloat16, CPU, [], ("bfloat16", True, False)),
        (torch.bfloat16, CUDA, ["--dtype", "float32"], ("float32", False, False)),
        (torch.float32, CPU, ["--dtype", "bfloat16"], ("bfloat16", True, False)),
        (torch.float32, CPU, ["--bf16", "true"], ("bfloat16", True, False)),
        (torch.bfloat16, CUDA, ["--bf16", "false"], ("float32", False, False)),
        (torch.bfloat16, CUDA, ["--fp16", "true"], ("float16", False, True)),
        (torch.bfloat16, CUDA, ["--dtype", "auto"], ("bfloat16", True, False)),
        # TRL's own combination: float32 weights under bfloat16 autocast.
        (torch.bfloat16, CUDA, ["--dtype", "float32", "--bf16", "true"], ("float32", True, False)),
    ],
)
def test_precision(monkeypatch: pytest.MonkeyPatch, best, device, options, expected) -> None:
    dtype, bf16, fp16 = decided(monkeypatch, best, device, *options)
    assert (dtype, bool(bf16), bool(fp16)) == expected


def test_a_recipes_own_default_is_kept_and_upstreams_is_replaced() -> None:
    from dataclasses import dataclass

    @dataclass
    class Own(SFTConfig):
        optim: str = "adafactor"

    assert run.training_defaults(SFTConfig)["optim"] == "paged_adamw_32bit"
    assert "optim" not in run.training_defaults(Own)
    assert run.training_defaults(Own)["ddp_find_unused_parameters"] is False
