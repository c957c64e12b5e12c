"""A run that was interrupted and resumed ends bit for bit as one that was not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.checkpoint.runs import ROWS, assert_equal, interrupted, options, read_rows, run
from tests.launch import ROOT, accelerate

ModelDir = Callable[..., Path]
SEVERAL_BATCHES = {"gradient_accumulation_steps": "2", "logging_steps": "2"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": "2"}
STREAM = {"dataset_streaming": "true", "shuffle_dataset": "true"}
STREAM_OF_PAIRS = {"dataset_streaming": "true"}
CELLS = {
    # The log is written every second step and the checkpoint at the third: half a row is carried over.
    "sft": ("sft", {**SEVERAL_BATCHES, **EVALUATED}),
    "dpo": ("dpo", {**SEVERAL_BATCHES, **EVALUATED}),
    "kto": ("kto", {**SEVERAL_BATCHES, **EVALUATED}),
    "reward": ("reward", {**SEVERAL_BATCHES, **EVALUATED}),
    # Eight rows, two a step, shuffled as they come: step 5 is the first of the second pass.
    "stream, second pass": ("sft", {**STREAM, "max_steps": "10", "save_steps": "5"}),
}
MORE_CELLS = {
    "packing": ("sft", {"packing": "true", "max_length": "64", **EVALUATED}),
    "epochs": ("sft", {"max_steps": "-1", "num_train_epochs": "1.5", "save_steps": "3", **EVALUATED}),
    "saved at the end of an epoch": (
        "sft",
        {"save_steps": "4", "eval_strategy": "epoch", "eval_on_start": "true"},
    ),
    "8-bit": ("sft", {"optim": "adamw_8bit", "lora_r": "64"}),
    "paged 32-bit": ("dpo", {"optim": "paged_adamw_32bit"}),
    "bfloat16": ("sft", {"dtype": "bfloat16", "bf16": "true"}),
    "plain": ("sft", {"fast": "none", **SEVERAL_BATCHES, **EVALUATED}),
    "plain dpo": ("dpo", {"fast": "none", **SEVERAL_BATCHES, **EVALUATED}),
    "plain packing": ("sft", {"fast": "none", "packing": "true", "max_length": "64"}),
    "wrapped packing": ("pretrain", {"max_length": "32", "max_steps": "6"}),
    "padding-free": ("sft", {"padding_free": "true", "max_length": "null", **SEVERAL_BATCHES, **EVALUATED}),
    "plain padding-free": (
        "sft",
        {"fast": "none", "padding_free": "true", "max_length": "null", **EVALUATED},
    ),
    "rows grouped by length": (
        "sft",
        {"train_sampling_strategy": "group_by_length", "max_steps": "10", "save_steps": "6"},
    ),
    "stream": ("sft", {**STREAM, **SEVERAL_BATCHES, **EVALUATED, "per_device_train_batch_size": "1"}),
    "stream, at the end of a pass": ("sft", {**STREAM, "max_steps": "8", "save_steps": "4"}),
    "stream, steps left over": (
        "sft",
        {**STREAM, "gradient_accumulation_steps": "3", "max_steps": "6", "save_steps": "2"},
    ),
    "stream of pairs": ("dpo", {**STREAM_OF_PAIRS, "max_steps": "10", "save_steps": "5"}),
}
# Of unequal micro-batches; step 3 is within the second epoch.
BUDGET = {"max_tokens_per_batch": "90", "per_device_train_batch_size": "4", **SEVERAL_BATCHES, **EVALUATED}
MORE_CELLS |= {"token budget": ("sft", BUDGET), "token budget of pairs": ("dpo", BUDGET)}
WHERE = {
    "saved at the end of an epoch": 4,
    "stream, second pass": 5,
    "stream, at the end of a pass": 4,
    "stream, steps left over": 2,
    "stream of pairs": 5,
    "rows grouped by length": 6,
}


def check(model_dir: ModelDir, tmp_path: Path, recipe: str, given: dict[str, str], step: int = 3) -> Path:
    rows = tiny.write_rows(tmp_path / "rows", ROWS[recipe](12))
    whole = tmp_path / "whole"
    assert run(recipe, options(model_dir("llama"), rows, whole, **given)) == 0
    parts = interrupted(whole, tmp_path / "parts", step)
    again = options(model_dir("llama"), rows, parts, **given)
    assert run(recipe, again, "--resume_from_checkpoint", "auto") == 0
    last = max(int(path.name[11:]) for path in whole.glob("checkpoint-*"))
    assert last > step
    assert_equal(whole, parts, last)
    return parts


@pytest.mark.parametrize("cell", CELLS)
def test_resumed_equals_uninterrupted(model_dir: ModelDir, tmp_path: Path, cell: str, capsys) -> None:
    step = WHERE.get(cell, 3)
    parts = check(model_dir, tmp_path, *CELLS[cell], step=step)
    tokens = [row["num_tokens"] for row in read_rows(parts) if "num_tokens" in row]
    assert tokens == sorted(tokens)
    assert len(set(tokens)) == len(tokens)
    assert f"rows after step {step} cut" in capsys.readouterr().out
    assert (parts / "_earlier" / "1" / "metrics.jsonl").is_file()


@pytest.mark.faults
@pytest.mark.parametrize("cell", MORE_CELLS)
def test_resumed_equals_uninterrupted_in_every_cell(model_dir: ModelDir, tmp_path: Path, cell: str) -> None:
    check(model_dir, tmp_path, *MORE_CELLS[cell], step=WHERE.get(cell, 3))


def test_a_finished_run_trains_no_step_more(model_dir: ModelDir, tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "rows", ROWS["sft"](24))
    output = tmp_path / "run"
    arguments = options(model_dir("llama"), rows, output, max_steps="2", save_steps="2")
    assert run("sft", arguments) == 0
    weights, logged = (output / "adapter_model.safetensors").read_bytes(), len(read_rows(output))
    assert run("sft", arguments, "--resume_from_checkpoint", "true") == 0
    assert (output / "adapter_model.safetensors").read_bytes() == weights
    assert len(read_rows(output)) == logged


@pytest.mark.distributed
@pytest.mark.parametrize("recipe", ["sft", "dpo", "kto", "reward"])
@pytest.mark.parametrize("processes", [2, 3])
def test_resumed_equals_uninterrupted_under_ddp(
    model_dir: ModelDir, tmp_path: Path, recipe: str, processes: int
) -> None:
    given = {**SEVERAL_BATCHES, **EVALUATED, "per_device_train_batch_size": "2" if recipe == "kto" else "1"}
    _check_under_ddp(model_dir, tmp_path, recipe, processes, given)


@pytest.mark.distributed
def test_resumed_equals_uninterrupted_in_a_later_epoch_under_ddp(model_dir: ModelDir, tmp_path: Path) -> None:
    """Upstream does not tell the sampler of a resume which epoch it is in."""
    _check_under_ddp(model_dir, tmp_path, "dpo", 2, BUDGET, rows=28)
    state = json.loads((tmp_path / "whole" / "checkpoint-3" / "trainer_state.json").read_text())
    assert 1 < state["epoch"] < 2


def _check_under_ddp(
    model_dir: ModelDir, tmp_path: Path, recipe: str, processes: int, given: dict[str, str], rows: int = 40
) -> None:
    data, whole = tiny.write_rows(tmp_path / "rows", ROWS[recipe](rows)), tmp_path / "whole"
    done = accelerate(recipe, *options(model_dir("llama"), data, whole, **given), processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]
    parts = interrupted(whole, tmp_path / "parts")
    again = [*options(model_dir("llama"), data, parts, **given), "--resume_from_checkpoint", "auto"]
    done = accelerate(recipe, *again, processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_equal(whole, parts)
    if (recipe, processes) == ("sft", 3):
        cold = interrupted(whole, tmp_path / "cold")
        again = [*options(model_dir("llama"), data, cold, **given), "--resume_from_checkpoint", "auto"]
        done = accelerate(recipe, *again, processes=processes, module="tests.checkpoint.cold", cwd=ROOT)
        assert done.returncode == 0, done.stderr[-4000:]
        weights = [(output / "adapter_model.safetensors").read_bytes() for output in (whole, cold)]
        assert weights[0] != weights[1], "DDP settles its buckets by itself: exactness need not"
