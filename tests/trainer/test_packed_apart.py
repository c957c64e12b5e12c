"""Packed and padding-free batches that a model would compute as one sequence are refused before training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from halfbyte import QLoRAPlugin
from halfbyte.cli import main
from halfbyte.errors import UserError
from tests import architectures, tiny

# transformers refuses the packed sequences of the first for want of a kernel, and joins those of the others.
JOINED = {
    "lfm2": "fails on packed sequences",
    "minimax": "computes packed sequences as one",
    "bloom": "computes packed sequences as one",
    "gpt_oss": "computes packed sequences as one",
}
PACKED: dict[str, dict[str, Any]] = {
    "packing": {"packing": True},
    "padding_free": {"padding_free": True, "max_length": None},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    saved: dict[str, str] = {}

    def get(name: str) -> str:
        if name not in saved:
            more = {"max_position_embeddings": 256} if name == "bloom" else {}
            saved[name] = architectures.save(tmp_path_factory.mktemp(name), name, **more)
        return saved[name]

    return get


def step(directory: str, output: Path, fast: str, **options: Any) -> Any:
    options = {"router_aux_loss_coef": 0.0, **options}
    return architectures.step(directory, output, {"fast": fast}, **options)[0]


@pytest.mark.parametrize("option", PACKED)
@pytest.mark.parametrize("name", JOINED)
def test_joined_sequences_are_refused(base, tmp_path: Path, name: str, option: str) -> None:
    message = rf"^{option}: \w+ {JOINED[name]}.*; leave `fast: auto`.* or write `{option}: false`$"
    with pytest.raises(UserError, match=message):
        step(base(name), tmp_path, "none", **PACKED[option])


def test_what_the_fast_step_keeps_apart_trains(base, tmp_path: Path) -> None:
    for name in ("lfm2", "gpt_oss"):
        assert step(base(name), tmp_path, "auto", packing=True).report.fusion.padding_free


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_what_transformers_keeps_apart_trains(model_dir, tmp_path: Path, arch: str) -> None:
    """Also in 16 bits, where experts round as many tokens as they see."""
    for dtype in ("float32", "bfloat16"):
        plugin = {"fast": "none", "dtype": dtype}
        trainer, _ = architectures.step(str(model_dir(arch)), tmp_path, plugin, packing=True)
        assert trainer.state.global_step == 1


def test_a_model_that_the_fast_step_does_not_cover_is_refused_with_its_reason(base, tmp_path: Path) -> None:
    message = r"the fast step does not keep them apart \(attention is eager; .*\); write `packing: false`$"
    with pytest.raises(UserError, match=message):
        step(base("bloom"), tmp_path, "auto", packing=True)
    assert step(base("bloom"), tmp_path, "auto").state.global_step == 1


def test_a_collator_of_one_s_own_is_tried_too(base, tmp_path: Path) -> None:
    """Under transformers' Trainer, which has no such options."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4)
    free = DataCollatorForLanguageModeling(pad_token_id=3, padding_free=True)
    with pytest.raises(UserError, match=r"^padding_free: Lfm2ForCausalLM fails on packed sequences"):
        QLoRAPlugin(dtype="float32").trainer(
            Trainer, model=base("lfm2"), args=args, train_dataset=rows, data_collator=free
        )


def test_packing_that_joins_by_its_name_trains(base, tmp_path: Path) -> None:
    wrapped = step(base("lfm2"), tmp_path, "none", packing=True, packing_strategy="wrapped")
    assert wrapped.state.global_step == 1


@pytest.mark.parametrize("command", [["sft"], ["plan", "sft"]])
def test_the_command_line_refuses_them_before_it_writes(
    base, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    config, output = tmp_path / "sft.yaml", tmp_path / "run"
    config.write_text(
        f"model_name_or_path: {base('lfm2')}\n"
        f"dataset_name: {tiny.write_rows(tmp_path / 'rows', tiny.texts(12))}\n"
        f"output_dir: {output}\ndtype: float32\nmax_length: 64\nfast: none\nreport_to: none\npacking: true\n"
    )
    assert main([*command, "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert f"{config}:8: packing: Lfm2ForCausalLM fails on packed sequences" in error
    assert not output.exists()


def test_packed_rows_are_evaluated_as_they_are_trained_on(model_dir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^eval_packing: .*; write `packing: true` as well, or take it out$"):
        step(str(model_dir("llama")), tmp_path, "auto", eval_packing=True)
    assert step(str(model_dir("llama")), tmp_path, "auto", eval_packing=True, packing=True)
