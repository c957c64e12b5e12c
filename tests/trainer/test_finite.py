"""What is not finite reaches neither the optimizer nor a checkpoint; memory that runs out is said with advice."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from halfbyte import run as running
from halfbyte.errors import Halted
from halfbyte.resilience.memory import ran_out
from halfbyte.trainer.finite import LossSpikes
from tests import tiny
from tests.checkpoint import saboteur
from tests.resilience.test_signals import checkpoints

BRIEF = {"save_steps": 2, "eval_strategy": "no", "max_steps": 4}


def run(options: list[str]) -> int:
    return running.main("saboteur", saboteur.recipe, options)


def written_rows() -> list[str]:
    return [" ".join(turn["content"] for turn in row["messages"]) for row in tiny.conversations(44)]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run(saboteur_options, tmp_path: Path, fault: str) -> None:
    with pytest.raises(Halted, match=f"step 3: {fault} not finite; no optimizer step was made of it"):
        run(saboteur_options(fault=fault, **BRIEF))
    output = tmp_path / "run"
    assert checkpoints(output) == [2]
    record = json.loads((output / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("failed", 2)
    dump = json.loads((output / "_nonfinite" / "step-3-rank-0.json").read_text())
    assert dump["not_finite"] == {"loss": fault == "loss", "gradient": fault == "gradient", "weight": False}
    (batch,) = dump["micro_batches"]
    said = written_rows()
    for number, sequence in zip(batch["rows"], batch["sequences"], strict=True):
        words = re.sub(r"<\|im_start\|>(user|assistant)|<\|im_end\|>", " ", sequence["text"])
        assert words.split() == said[number - 1].split()


def test_a_ruined_weight_is_not_saved(saboteur_options, tmp_path: Path) -> None:
    with pytest.raises(Halted, match="step 4: weight not finite after the optimizer step; it is not saved"):
        run(saboteur_options(fault="weight", fault_step=4, **BRIEF))
    output = tmp_path / "run"
    assert checkpoints(output) == [2]
    weights = load_file(output / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_skip_leaves_the_step_out(saboteur_options, tmp_path: Path) -> None:
    assert run(saboteur_options(fault="gradient", on_nonfinite="skip", **{**BRIEF, "save_steps": 1})) == 0
    output = tmp_path / "run"
    record = json.loads((output / "run.json").read_text())
    assert record["skipped_steps"] == [3]
    after = {
        step: load_file(output / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 3, 4)
    }
    assert all(torch.equal(after[2][name], after[3][name]) for name in after[2]), "no update, no decay"
    assert not all(torch.equal(after[3][name], after[4][name]) for name in after[3])
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(row["loss"] > 0 for row in rows if "loss" in row)


def test_skip_has_a_bound(saboteur_options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.trainer.finite.MOST_SKIPPED", 0)
    with pytest.raises(Halted, match="step 3: loss not finite"):
        run(saboteur_options(fault="loss", on_nonfinite="skip", **BRIEF))


def test_out_of_memory_ends_with_advice(saboteur_options, tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError) as error:
        run(saboteur_options(fault="memory", **BRIEF))
    told = str(error.value)
    assert told.startswith("out of memory in step 3: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "`per_device_train_batch_size: 1` and `gradient_accumulation_steps: 2`" in told
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_memory_that_a_cpu_refuses_is_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert not isinstance(error.value, torch.OutOfMemoryError)
    assert ran_out(error.value)
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory."))
    assert not ran_out(RuntimeError("shape mismatch"))


def test_a_spike_is_noted_once(capsys: pytest.CaptureFixture) -> None:
    spikes, args = LossSpikes(), SimpleNamespace(process_index=0)
    for step in range(40):
        loss = 2.0 + 0.1 * (step % 3) + (6.0 if step == 30 else 0.0)
        spikes.on_log(args, SimpleNamespace(global_step=step), None, {"loss": loss})
    assert capsys.readouterr().err == "step 30: loss 8, a spike: the recent median is 2.1\n"


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_both_ranks_stop_where_one_has_it(launched, tmp_path: Path, fault: str) -> None:
    started = launched("accelerate", fault=fault, fault_target="1", **BRIEF)
    assert started.process.wait(timeout=180) == 1
    output = tmp_path / "run"
    assert [(output / f"left-{rank}").read_text() for rank in (0, 1)] == ["2\n", "2\n"]
    assert started.printed.count("error: step 3: ") == 1
    assert json.loads((output / "run.json").read_text())["status"] == "failed"
    assert (output / "_nonfinite" / "step-3-rank-1.json").is_file()


@pytest.mark.faults
def test_memory_that_one_rank_lacks_ends_both(launched, tmp_path: Path) -> None:
    started = launched("accelerate", fault="memory", fault_target="1", **BRIEF)
    assert started.process.wait(timeout=180) == 1
    assert started.left() == []
    assert "rank 1: error: OutOfMemoryError: out of memory in step 3" in started.printed
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
