"""`max_tokens_per_batch`: unequal micro-batches, and the gradient, loss and figures of their rows in one batch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer

from halfbyte import QLoRAPlugin
from halfbyte.cli import main
from halfbyte.errors import UserError
from tests import plain_trl, tiny
from tests.checkpoint.runs import options, read_rows
from tests.plain_trl import Steps

ModelDir = Callable[..., Path]
ROWS = 12
# Many more than there are micro-batches: a step is an epoch.
EPOCH = {"gradient_accumulation_steps": 99, "num_train_epochs": 2, "max_steps": -1, "optim": "sgd"}


def conversations() -> list[dict[str, Any]]:
    """Rows from short to long."""
    rows = tiny.conversations(ROWS)
    for n, row in enumerate(rows):
        row["messages"][-1]["content"] += " and more" * n
    return rows


def pairs() -> list[dict[str, Any]]:
    rows = tiny.preferences(ROWS)
    for n, row in enumerate(rows):
        row["chosen"] = row["rejected"][: len(row["rejected"]) // 2] + row["chosen"] + " and more" * n
    return rows


CELLS: dict[str, tuple[type, type, Callable[[], list[dict[str, Any]]], int, dict[str, Any]]] = {
    "sft": (SFTTrainer, SFTConfig, conversations, 150, {}),
    "sft, padded": (SFTTrainer, SFTConfig, conversations, 200, {"fast": "none"}),
    "dpo": (DPOTrainer, DPOConfig, pairs, 150, {}),
    "dpo, precomputed": (DPOTrainer, DPOConfig, pairs, 150, {"precompute_ref_log_probs": True}),
    "dpo, padded": (DPOTrainer, DPOConfig, pairs, 300, {"fast": "none"}),
    "reward": (RewardTrainer, RewardConfig, pairs, 300, {}),
    "cpo": (CPOTrainer, CPOConfig, pairs, 300, {"cpo_alpha": 0.0}),
}


def made(model_dir: ModelDir, output: Path, cell: str, budget: int | None, **given: Any) -> Any:
    trainer_cls, config, rows, _, more = CELLS[cell]
    changed = {**EPOCH, **more, **given}
    plugin = QLoRAPlugin(dtype="float32", max_tokens_per_batch=budget, fast=changed.pop("fast", "auto"))
    return plugin.trainer(
        trainer_cls,
        model=str(model_dir("llama")),
        args=plain_trl.arguments(config, output, **changed),
        train_dataset=Dataset.from_list(rows()),
    )


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_is_that_of_its_rows_in_one_batch(model_dir: ModelDir, tmp_path: Path, cell: str) -> None:
    budget = CELLS[cell][3]
    whole = made(model_dir, tmp_path / "whole", cell, None, per_device_train_batch_size=ROWS)
    parts = made(model_dir, tmp_path / "parts", cell, budget, per_device_train_batch_size=5)
    batching = parts.report.batching
    counts = {len(batch) for batch in batching}
    assert len(batching) > 2
    assert len(counts) > 1, "the micro-batches are of different sizes"
    assert max(counts) <= 5
    found, wanted = Steps.of(parts), Steps.of(whole)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
    assert len(found.losses) == len(found.gradients) == 2
    for one, other in zip(found.gradients, wanted.gradients, strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm()
    logged = [row for row in parts.state.log_history if "loss" in row]
    assert [row["rows"] for row in logged] == [ROWS, ROWS]
    for one, other in zip(logged, whole.state.log_history, strict=False):
        for name in ("mean_token_accuracy", "rewards/margins", "accuracy", "margin"):
            if name in other:
                assert one[name] == pytest.approx(other[name], abs=1e-4), name


def test_the_tokens_of_a_batch_are_those_of_the_forward(model_dir: ModelDir, tmp_path: Path) -> None:
    trainer = made(model_dir, tmp_path, "dpo", 150, per_device_train_batch_size=5)
    sizes = [batch["stream_ids"].numel() for batch in trainer.get_train_dataloader()]
    assert len(sizes) == len(trainer.report.batching) == len(trainer.get_train_dataloader())
    assert max(sizes) <= 150
    trainer = made(model_dir, tmp_path, "sft", 150, per_device_train_batch_size=5)
    assert max(batch["input_ids"].numel() for batch in trainer.get_train_dataloader()) <= 150


def test_the_run_says_what_its_batches_are(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, output = conversations(), tmp_path / "run"
    rows[0]["messages"][-1]["content"] += " and more" * 60
    data = tiny.write_rows(tmp_path / "rows", rows)
    given = {"max_tokens_per_batch": "160", "per_device_train_batch_size": "8", "save_strategy": "no"}
    assert main(["sft", *options(model_dir("llama"), data, output, **given)]) == 0
    told = capsys.readouterr().out
    batching = json.loads((output / "run.json").read_text())["batching"]
    assert batching["rows"] == ROWS - 4  # held out
    assert batching["max_tokens_per_batch"] == 160
    assert batching["longer_rows"] == 1
    assert f"batches: {batching['micro_batches']} an epoch, of at most 160 tokens" in told
    assert "rows longer than max_tokens_per_batch: 1, each alone" in told
    logged = [row["rows"] for row in read_rows(output) if "loss" in row]
    assert len(logged) == 6
    assert 1 <= min(logged) < max(logged) <= 8


REFUSED = {
    "packing": ("sft", {"packing": "true"}, "packing: it fills every row"),
    "stream": ("sft", {"dataset_streaming": "true"}, "dataset_streaming: a stream does not say"),
    "drop_last": ("sft", {"dataloader_drop_last": "true"}, "dataloader_drop_last: it drops batches"),
    "grouped": (
        "sft",
        {"train_sampling_strategy": "group_by_length"},
        "train_sampling_strategy: group_by_length makes batches",
    ),
    "on_oom": ("dpo", {"on_oom": "accumulate"}, "on_oom: accumulate divides the rows"),
    "nothing": ("sft", {"max_tokens_per_batch": "0"}, "max_tokens_per_batch: must be at least 1"),
    "split": ("sft", {"accelerator_config": '{"split_batches": true}'}, "split a batch by rows"),
}


@pytest.mark.parametrize("cell", REFUSED)
def test_what_it_cannot_be_combined_with(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], cell: str
) -> None:
    recipe, given, reason = REFUSED[cell]
    rows = conversations() if recipe == "sft" else pairs()
    data, output = tiny.write_rows(tmp_path / "rows", rows), tmp_path / "run"
    given = {"max_tokens_per_batch": "99", **given}
    assert main([recipe, *options(model_dir("llama"), data, output, **given)]) == 2
    assert reason in capsys.readouterr().err
    assert not output.exists()


def test_rows_of_unknown_length(model_dir: ModelDir, tmp_path: Path) -> None:
    plugin = QLoRAPlugin(dtype="float32", max_tokens_per_batch=99)
    args = plain_trl.arguments(SFTConfig, tmp_path, max_steps=1)
    rows = Dataset.from_list(tiny.texts(4)).to_iterable_dataset()
    with pytest.raises(UserError, match="the rows of SFTTrainer do not say how many tokens they are"):
        plugin.trainer(SFTTrainer, model=str(model_dir("llama")), args=args, train_dataset=rows)


def test_rows_that_meet_in_one_batch_beforehand(model_dir: ModelDir, tmp_path: Path) -> None:
    plugin = QLoRAPlugin(dtype="float32", max_tokens_per_batch=99)
    args = plain_trl.arguments(KTOConfig, tmp_path, max_steps=1)
    rows = Dataset.from_list(tiny.labelled(4))
    with pytest.raises(UserError, match="KTO compares the rows of one micro-batch"):
        plugin.trainer(KTOTrainer, model=str(model_dir("llama")), args=args, train_dataset=rows)
