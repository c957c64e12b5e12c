"""Decisions are taken once, and alike for the command line and for training arguments."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, RLOOConfig, SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin, quantization, resolve, run
from halfbyte import recipe as recipes
from halfbyte.errors import UserError
from halfbyte.recipe import Recipe
from tests import tiny

CPU = torch.device("cpu")


def given(tmp_path: Path, **options: Any) -> SFTConfig:
    return SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def decided(args: SFTConfig, **plugin: Any) -> resolve.Decisions:
    return resolve.for_arguments(QLoRAPlugin(**plugin), args, "a-model")


@pytest.mark.parametrize(
    ("options", "dtype"), [({"bf16": True}, "bfloat16"), ({"bf16": False}, "float32"), ({}, "bfloat16")]
)
def test_the_base_computes_in_the_dtype_of_the_arguments(tmp_path: Path, options, dtype: str) -> None:
    """The last case is TRL's default: autocast to bfloat16, whatever the device is good at."""
    found = decided(given(tmp_path, **options))
    assert found.dtype == dtype
    (line,) = [line for line in found.lines if line.startswith("compute dtype")]
    assert dtype in line


def test_a_dtype_that_autocast_overrules_is_reported(tmp_path: Path) -> None:
    found = decided(given(tmp_path, bf16=True), dtype="float32")
    assert found.dtype == "float32"
    words = "the base computes in bfloat16 under autocast, as the arguments say"
    assert any(words in line for line in found.lines)
    found = decided(given(tmp_path, bf16=False), dtype="float32")
    assert not any("autocast" in line for line in found.lines)


def test_the_command_line_and_the_api_decide_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same options, written in a file or given to the classes, have one outcome."""
    monkeypatch.setattr(quantization, "choose_compute_dtype", lambda *_: torch.float32)
    words = ["--model_name_or_path", "a-model", "--output_dir", str(tmp_path), "--report_to", "none"]
    words += ["--use_cpu", "true", "--bf16", "true", "--fp16", "false", "--optim", "paged_adamw_8bit"]
    recipe = recipes.load("sft")
    settings = run.read("sft", recipe, words)
    resolve.join(settings)
    by_line = resolve.for_run(settings, None)
    args = given(
        tmp_path, bf16=True, optim="paged_adamw_8bit", gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    by_api = decided(args)
    for name in ("device", "strategy", "dtype", "base", "revision", "adapter", "quant_storage", "lines"):
        assert getattr(by_line, name) == getattr(by_api, name), name
    both = by_line.values.keys() & by_api.values.keys()
    assert {"dtype", "optim", "gradient_checkpointing_kwargs"} <= both
    assert {key: by_line.values[key] for key in both} == {key: by_api.values[key] for key in both}


def test_what_no_run_can_have_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"activation_offloading: .* this run is on the CPU; take it out"):
        decided(given(tmp_path, activation_offloading=True))
    for config in (GRPOConfig, RLOOConfig):
        args = config(output_dir=str(tmp_path), use_cpu=True, report_to="none", use_vllm=True)
        with pytest.raises(UserError, match=r"use_vllm: .* quantizes a 4-bit base anew"):
            decided(args)
        assert decided(args, load_in_4bit=False)


@pytest.mark.parametrize("option", ["activation_offloading", "use_vllm"])
def test_the_command_line_refuses_it_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture, option: str
) -> None:
    config = {"activation_offloading": SFTConfig, "use_vllm": GRPOConfig}[option]
    recipe = Recipe(config=config, trainer=SFTTrainer, summary="s")
    words = ["--model_name_or_path", "none", "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    with pytest.raises(UserError, match=f"--{option}: "):
        run.main("odd", recipe, [*words, f"--{option}", "true", "--use_cpu", "true", "--bf16", "false"])
    assert not (tmp_path / "run").exists()


def test_arguments_and_plugin_are_left_as_they_were(tmp_path: Path, model_dir) -> None:
    plugin, args = QLoRAPlugin(), given(tmp_path, optim="paged_adamw_32bit")
    before = str(plugin), args.to_dict()
    rows = Dataset.from_list(tiny.texts(4))
    trainer = plugin.trainer(SFTTrainer, model=str(model_dir("llama")), args=args, train_dataset=rows)
    assert str(getattr(trainer.args.optim, "value", trainer.args.optim)) == "adamw_torch"
    assert (str(plugin), args.to_dict()) == before


def test_trls_default_precision_is_that_of_the_whole_run(tmp_path: Path, model_dir) -> None:
    plugin = QLoRAPlugin()
    rows = Dataset.from_list(tiny.texts(4))
    trainer = plugin.trainer(
        SFTTrainer, model=str(model_dir("llama")), args=given(tmp_path), train_dataset=rows
    )
    assert trainer.accelerator.mixed_precision == "bf16"
    assert plugin.dtype is None
    base = {
        str(p.dtype) for n, p in trainer.model.named_parameters() if p.is_floating_point() and "lora" not in n
    }
    assert base == {"torch.bfloat16"}


def test_a_kernel_package_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use_liger_kernel: liger-kernel is not installed"):
        decided(given(tmp_path, use_liger_kernel=True))


def test_reentrant_checkpointing_under_ddp_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = given(tmp_path, bf16=False, gradient_checkpointing_kwargs={"use_reentrant": True})
    decided(args)
    options = resolve._by_name(QLoRAPlugin(), args, "a-model")
    with pytest.raises(UserError, match="use_reentrant: true fails under DDP"):
        resolve._training(options, {"report_to"}, "cpu", 2, {}, [])
