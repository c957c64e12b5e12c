"""Completions while a sharded base is trained: those of one process, and training does not notice them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint import runs
from tests.distributed import sharded

# Of a checkpoint, what names its directory.
NAMED = {"trainer_state.json", "training_args.json", "adapter_config.json", "README.md", ".metadata"}
PROMPTS = ["the quick fox", "one two three four", "hello"]


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_ranks_complete_their_shares_in_step(
    tmp_path: Path, model_dir: Callable[..., Path], strategy: str
) -> None:
    """Before the first step too, with the reference's completions beside; the last prompt is one for two ranks."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    options = {
        "model_name_or_path": str(model_dir("llama")),
        "learning_rate": 1e-2,
        "eval_on_start": True,
        "per_device_eval_batch_size": 1,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    sampled = {"sample_prompts": str(prompts), "sample_max_new_tokens": 8}
    found = {}
    for name, processes, more in (("one", 1, sampled), ("plain", 2, {}), ("sampled", 2, sampled)):
        (root := tmp_path / name).mkdir()
        found[name] = sharded.train(root, "dpo", strategy, processes, options | more)
    _assert_bitwise(found["plain"], found["sampled"])
    rows = {name: runs.read_rows(found[name].output, "samples.jsonl") for name in ("one", "sampled")}
    assert [(row["step"], row["number"]) for row in rows["sampled"]] == [
        (s, n) for s in (0, 3, 6) for n in (1, 2, 3)
    ]
    assert rows["sampled"] == rows["one"]
    assert [row["completion"] for row in rows["sampled"][6:]] != [
        row["reference"] for row in rows["sampled"][6:]
    ]


def _assert_bitwise(one: sharded.Finished, other: sharded.Finished) -> None:
    """Losses, adapters, and of the last checkpoint weights, optimizer, scheduler, generators and counters."""
    assert sharded.furthest(one.adapter, other.adapter) == 0.0
    for key in ("loss", "grad_norm", "eval_loss"):
        assert one.logged(key) == other.logged(key)
    first, second = (runs.entries(run.output / "checkpoint-6") for run in (one, other))
    assert first.keys() == second.keys()
    differ = [name for name in first if first[name]["sha256"] != second[name]["sha256"]]
    assert {Path(name).name for name in differ} <= NAMED
