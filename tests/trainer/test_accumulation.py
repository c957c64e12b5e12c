"""`on_oom: accumulate`: a step that runs out of memory is done again in smaller parts, by all ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte import run as running
from halfbyte.checkpoint import manifest
from halfbyte.cli import main
from halfbyte.errors import Halted, UserError
from halfbyte.trainer import accumulation
from halfbyte.trainer.compose import compose
from tests import tiny
from tests.checkpoint import saboteur
from tests.checkpoint.runs import assert_equal, options, read_rows

# Forty rows, eight a step: five steps an epoch. There is memory for micro-batches of one from `fault_step` on.
LARGE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
SMALL = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
SHORT = {"fault": "memory", "fault_rows": 1, "on_oom": "accumulate", **LARGE}
BRIEF = {"save_steps": 2, "eval_strategy": "no", "max_steps": 7, "learning_rate": 1e-2}
# Adam divides a gradient by its size, and so makes much of the rounding by which two shapes differ.
LINEAR = {"optim": "sgd", "learning_rate": 1.0}


def run(options: list[str]) -> int:
    return running.main("saboteur", saboteur.recipe, options)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_rows(output) if "loss" in row]


def close(one: Path, other: Path) -> None:
    assert losses(one) == pytest.approx(losses(other), abs=1e-6)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("step", "place"),
    [
        (3, "backward"),
        *(pytest.param(*cell, marks=pytest.mark.faults) for cell in ((1, "step"), (6, "backward"))),
    ],
)
def test_it_goes_on_as_a_run_begun_with_less(
    saboteur_options, tmp_path: Path, step: int, place: str, capsys: pytest.CaptureFixture
) -> None:
    """In the middle of an epoch, in the first step of all, in the first of the second epoch."""
    assert (
        run(saboteur_options(**{**SHORT, **BRIEF, **LINEAR, "fault_step": step, "fault_place": place})) == 0
    )
    told = capsys.readouterr().err
    assert f"step {step}: out of memory on rank 0 (CUDA out of memory. Tried to allocate 2.00 GiB.)" in told
    assert told.count("repeated with") == 2
    assert run(saboteur_options(**{**SMALL, **BRIEF, **LINEAR, "output_dir": tmp_path / "small"})) == 0
    close(tmp_path / "run", tmp_path / "small")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["micro_batches"] == [
        {"from_step": step, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"from_step": step, **SMALL},
    ]
    tokens = [row["num_tokens"] for row in read_rows(tmp_path / "run") if "num_tokens" in row]
    assert tokens == [row["num_tokens"] for row in read_rows(tmp_path / "small") if "num_tokens" in row]


@pytest.mark.faults
def test_it_is_deterministic_and_resumes_bit_for_bit(saboteur_options, tmp_path: Path) -> None:
    """With dropout: whatever the failed attempt has drawn, and a resume goes on in the same parts."""
    given = {**SHORT, **BRIEF, "lora_dropout": 0.1, "fault_step": 3}
    whole, other, parts = (tmp_path / name for name in ("whole", "other", "parts"))
    assert run(saboteur_options(**given, fault_place="backward", output_dir=whole)) == 0
    assert run(saboteur_options(**given, fault_place="step", output_dir=other)) == 0
    assert (whole / "adapter_model.safetensors").read_bytes() == (
        other / "adapter_model.safetensors"
    ).read_bytes()
    position = manifest.read(whole / "checkpoint-4").data_position
    assert (position["rows_per_batch"], position["batches_per_step"]) == (1, 8)
    shutil.copytree(whole / "checkpoint-4", parts / "checkpoint-4")
    shutil.copyfile(whole / "metrics.jsonl", parts / "metrics.jsonl")
    again = saboteur_options(**given, fault_place="backward", output_dir=parts)
    assert run([*again, "--resume_from_checkpoint", "auto"]) == 0
    assert_equal(whole, parts, 6)
    record = json.loads((parts / "run.json").read_text())
    assert record["micro_batches"] == [{"from_step": 5, **SMALL}]


def test_a_micro_batch_of_one_that_does_not_fit_stops_the_run(saboteur_options, tmp_path: Path) -> None:
    given = {**SHORT, **BRIEF, "fault_rows": 0, "per_device_train_batch_size": 3}
    with pytest.raises(Halted, match=r"out of memory in step 3: .*\(micro-batches of one\)\n  .*max_length"):
        run(saboteur_options(**given))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["micro_batches"] == [
        {"from_step": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
    ]


def test_what_it_cannot_do_is_refused(saboteur_options, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dataloader_drop_last"):
        run([*saboteur_options(on_oom="accumulate", **BRIEF), "--dataloader_drop_last", "true"])
    assert not (tmp_path / "run").exists()


def test_a_kl_term_of_a_micro_batch_is_refused(model_dir, tmp_path: Path, capsys) -> None:
    rows = tiny.write_rows(tmp_path / "rows", tiny.labelled(12))
    words = options(model_dir("llama"), rows, tmp_path / "run", on_oom="accumulate")
    assert main(["kto", *words]) == 2
    assert "on_oom: accumulate: KTO estimates its KL term within a micro-batch" in capsys.readouterr().err
    assert main(["kto", *words, "--loss_type", "apo_zero_unpaired"]) == 0


def test_a_trainer_that_makes_its_own_batches_is_refused() -> None:
    from trl import GRPOTrainer

    composed = compose(GRPOTrainer, (accumulation.AccumulateOnOutOfMemory,))
    trainer = composed.__new__(composed)
    trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
    trainer.args = None
    with pytest.raises(UserError, match="GRPOTrainer makes its batches itself"):
        trainer._refuse()


@pytest.mark.faults
@pytest.mark.parametrize("place", ["step", "backward"])
def test_both_ranks_do_it_again_where_one_lacks_memory(
    launched, saboteur_options, tmp_path: Path, place: str
) -> None:
    """Rank 0 waits in a collective of the loss, or has done its backward; both end with what one process has."""
    rows = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    started = launched(
        "accelerate",
        **{**SHORT, **BRIEF, **LINEAR, **rows, "fault_target": "1", "fault_place": place, "max_steps": 5},
    )
    assert started.process.wait(timeout=180) == 0, started.printed[-3000:]
    assert started.printed.count("step 3: out of memory on rank 1 (CUDA out of memory.") == 1
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["micro_batches"] == [
        {"from_step": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    ]
    one = saboteur_options(**{**SMALL, **BRIEF, **LINEAR, "max_steps": 5, "output_dir": tmp_path / "one"})
    assert run(one) == 0
    close(tmp_path / "run", tmp_path / "one")
