"""What a run on a 4-bit base changes in the arguments it is given, and what it says of it."""

from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig

from halfbyte import QLoRAPlugin, arguments
from halfbyte.errors import UserError


def given(tmp_path: Path, **options: Any) -> SFTConfig:
    return SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize(
    ("options", "dtype"), [({"bf16": True}, "bfloat16"), ({"bf16": False}, "float32"), ({}, "bfloat16")]
)
def test_the_base_computes_in_the_dtype_of_the_arguments(tmp_path: Path, options, dtype: str) -> None:
    """The last case is TRL's default: autocast to bfloat16, whatever the device is good at."""
    found, lines = arguments.mend(given(tmp_path, **options), dtype=None, use_peft=True)
    assert found == dtype
    (line,) = [line for line in lines if line.startswith("compute dtype")]
    assert dtype in line


def test_a_dtype_that_autocast_overrules_is_said(tmp_path: Path) -> None:
    found, lines = arguments.mend(given(tmp_path, bf16=True), dtype="float32", use_peft=True)
    assert found == "float32"
    assert "dtype: the base is in float32, and computes in bfloat16 as the arguments say" in lines
    _, lines = arguments.mend(given(tmp_path, bf16=False), dtype="float32", use_peft=True)
    assert not any("dtype" in line for line in lines)


def test_trls_default_precision_is_that_of_the_whole_run(tmp_path: Path, model_dir) -> None:
    from datasets import Dataset
    from trl import SFTTrainer

    from tests import tiny

    plugin = QLoRAPlugin()
    rows = Dataset.from_list(tiny.texts(4))
    trainer = plugin.trainer(
        SFTTrainer, model=str(model_dir("llama")), args=given(tmp_path), train_dataset=rows
    )
    assert trainer.accelerator.mixed_precision == "bf16"
    assert plugin.dtype == "bfloat16"
    base = {
        str(p.dtype) for n, p in trainer.model.named_parameters() if p.is_floating_point() and "lora" not in n
    }
    assert base == {"torch.bfloat16"}


def test_a_kernel_package_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use_liger_kernel: liger-kernel is not installed"):
        arguments.mend(given(tmp_path, use_liger_kernel=True), dtype=None, use_peft=True)


def test_reentrant_checkpointing_under_ddp_is_refused(tmp_path: Path) -> None:
    args = given(tmp_path, bf16=False, gradient_checkpointing_kwargs={"use_reentrant": True})
    arguments.mend(args, dtype="float32", use_peft=True)

    class Two:
        """The same arguments as two processes see them."""

        world_size = 2

        def __getattr__(self, name: str):
            return getattr(args, name)

    with pytest.raises(UserError, match="use_reentrant: true fails under DDP"):
        arguments.mend(Two(), dtype="float32", use_peft=True)
