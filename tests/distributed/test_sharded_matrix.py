"""Every recipe under every strategy that shards the base equals one process: losses, adapters, reloaded figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import architectures, tiny
from tests.distributed import sharded
from tests.distributed.sharded import Finished, one_process

__all__ = ["one_process"]

# Without the router's loss, which TRL computes of a rank's own tokens.
EXPERTS = {
    "lora_target_parameters": "[experts.gate_up_proj, experts.down_proj]",
    "router_aux_loss_coef": 0.0,
}
CELLS = [
    pytest.param(recipe, strategy, processes, marks=() if quick else pytest.mark.distributed)
    for strategy, processes in (("fsdp2", 2), ("fsdp2", 3), ("zero3", 2))
    for recipe in ("sft", "dpo", "dpo on sft")
    for quick in ((recipe, strategy, processes) == ("sft", "fsdp2", 2),)
]


@pytest.mark.parametrize(("cell", "strategy", "processes"), CELLS)
def test_a_sharded_base_trains_as_a_whole_one(
    tmp_path: Path,
    model_dir: Callable[..., Path],
    one_process: Callable[[str], Finished],
    cell: str,
    strategy: str,
    processes: int,
) -> None:
    recipe = cell[:3]
    options: dict[str, Any] = sharded.beginning(cell, model_dir, one_process)
    options |= {"save_strategy": "steps", "save_steps": 6}
    run = sharded.train(tmp_path, recipe, strategy, processes, options)
    sharded.assert_equal(one_process(cell), run)

    recorded = run.record["strategy"]
    assert (recorded["name"], recorded["world_size"]) == (strategy, processes)
    whole = one_process(cell).record["strategy"]["base_bytes_per_rank"][0]
    # The scales of the packed weights stay whole on every rank: 2 of every 66 bytes, more for a tiny model.
    assert max(recorded["base_bytes_per_rank"]) < whole / processes * 1.4

    last = run.output / "checkpoint-6"
    adapters = {path.parent: load_file(path) for path in last.rglob("adapter_model.safetensors")}
    expected = {last: run.adapter}
    if cell == "dpo on sft":
        expected[last / "ref"] = one_process("sft").adapter
    assert adapters.keys() == expected.keys()
    assert all(sharded.furthest(adapters[path], expected[path]) == 0.0 for path in expected)

    fast = run.record["fast"]
    assert (fast["mode"], fast["layers"], fast["linears"]) == ("auto", 2, 14)
    assert "fell_back" not in fast
    assert recipe == "dpo" or (fast["head"], fast["batches"]) == ("on", "on")

    recorded = run.record["metrics"]["eval"]
    for key, value in sharded.evaluate(recipe, run, tmp_path / "scratch").items():
        assert value == pytest.approx(recorded[key], rel=1e-6, abs=1e-5), key


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "processes", "arch", "options"),
    [
        ("fsdp2", 3, "qwen3", {"gradient_accumulation_steps": 2, "eval_on_start": True}),
        ("zero3", 3, "qwen3", {"gradient_accumulation_steps": 2, "eval_on_start": True}),
        ("fsdp2", 2, "opt", {}),
        ("fsdp2", 2, "llama", {"bnb_4bit_quant_storage": "float32"}),
        ("fsdp2", 2, "llama", {"use_dora": True, "loraplus_lr_ratio": 4.0}),
        ("cpu", 2, "qwen3_moe", EXPERTS),
        ("fsdp2", 2, "qwen3_moe", EXPERTS),
        ("fsdp2", 2, "gpt_oss", {"router_aux_loss_coef": 0.0}),
        ("zero3", 2, "granite_swa", {}),
        ("fsdp2", 2, "qwen3_next", {"router_aux_loss_coef": 0.0}),
        ("zero3", 2, "minicpm3", {}),
    ],
    ids=[
        "tied, uneven, accumulation",
        "tied, uneven, accumulation, ZeRO-3",
        "opt",
        "float storage",
        "DoRA, LoRA+",
        "experts, DDP",
        "experts, FSDP2",
        "sinks, FSDP2",
        "sinks, ZeRO-3",
        "state layers and experts, FSDP2",
        "latents, ZeRO-3",
    ],
)
def test_other_models_and_options_too(
    tmp_path: Path,
    model_dir: Callable[..., Path],
    strategy: str,
    processes: int,
    arch: str,
    options: dict[str, Any],
) -> None:
    """Among them what is not divisible by the ranks: 64 rows over three ranks, with a head tied to the embeddings."""
    base = model_dir(arch) if arch in tiny.CONFIGS else architectures.save(tmp_path / "base", arch)
    options = {"model_name_or_path": str(base), **options}
    runs = []
    for count in (1, processes):
        (root := tmp_path / f"{count}").mkdir()
        runs.append(sharded.train(root, "sft", strategy, count, options))
    sharded.assert_equal(*runs)
