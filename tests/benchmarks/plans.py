"""Predict what common shapes take on one GPU, for launch/README.md: `python -m tests.benchmarks.plans [--write]`.

The memory model's figures at `memory_budget: min`, one row or pair at a time, for models that are not loaded; and the
time of training tokens, from what cards can compute and an assumed share of it.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from halfbyte import QLoRAPlugin, fast, loading, memory, resolve
from halfbyte.memory import Memory, Workload
from halfbyte.plan.target import CONTEXT
from halfbyte.terminal.wording import duration
from halfbyte.trainer.model_flops import flops_per_token

README = Path(__file__).parents[2] / "launch" / "README.md"
BEGIN, END = "<!-- plans: python -m tests.benchmarks.plans --write -->", "<!-- end of plans -->"
CARDS = (16, 24, 48, 80)
# GiB, and dense bfloat16 products with float32 sums in FLOP/s, by the data sheets.
NAMED = {
    "RTX 4090": (24, 165e12),
    "L40S": (48, 362e12),
    "A100 80 GB": (80, 312e12),
    "H100 SXM": (80, 989e12),
}
# The share of it that products reach, with a forward that is computed twice: assumed, not measured.
UTILIZATION, RECOMPUTED = 0.4, 1.5
TOKENS = 10_000_000


@dataclass(frozen=True)
class Shape:
    """A model by its sizes: hidden, feed-forward, layers, heads, key-value heads and vocabulary."""

    name: str
    config: type
    hidden: int
    features: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    more: Mapping[str, int] = field(default_factory=dict)


# Adapters on attention: experts are an option of their own.
MOE = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
SHAPES = (
    Shape("Llama 3.2 1B", LlamaConfig, 2048, 8192, 16, 32, 8, 128_256, tied=True),
    Shape("Qwen3 8B", Qwen3Config, 4096, 12_288, 36, 32, 8, 151_936),
    Shape("Qwen3 14B", Qwen3Config, 5120, 17_408, 40, 40, 8, 151_936),
    Shape("Qwen3 32B", Qwen3Config, 5120, 25_600, 64, 64, 8, 151_936),
    Shape("Qwen3 30B-A3B", Qwen3MoeConfig, 2048, 6144, 48, 32, 4, 151_936, more=MOE),
    Shape("Llama 3.1 70B", LlamaConfig, 8192, 28_672, 80, 64, 8, 128_256),
)
# A pair whose prompt is half of it and is computed once: 1.5 times the tokens of a row.
STEPS = {"SFT, 2k": 2048, "SFT, 8k": 8192, "DPO, 2k": 3072, "DPO, 8k": 12_288}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into launch/README.md")
    shapes = [(shape, planned(shape)) for shape in SHAPES]
    text = f"{table(shapes)}\n\n{times(shapes)}"
    print(text)
    if parser.parse_args().write:
        whole = README.read_text(encoding="utf-8")
        before, rest = whole.split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def table(shapes: list[tuple[Shape, Any]]) -> str:
    """Every shape: what it holds at the peak of each kind of step, and the smallest card that it fits on."""
    lines = [f"| Model | {' | '.join(STEPS)} | 2 GPUs, FSDP2, SFT 2k |", f"|{'---|' * (len(STEPS) + 2)}"]
    lines += [f"| {shape.name} | {' | '.join(cells(model))} |" for shape, model in shapes]
    return "\n".join(lines)


def times(shapes: list[tuple[Shape, Any]]) -> str:
    """Every shape: the time of 10 million tokens of SFT on each named card that it fits on."""
    lines = [f"| Time of 10M tokens, SFT, 2k | {' | '.join(NAMED)} |", f"|{'---|' * (len(NAMED) + 1)}"]
    lines += [f"| {shape.name} | {' | '.join(durations(model))} |" for shape, model in shapes]
    return "\n".join(lines)


def durations(model: Any) -> Iterator[str]:
    held = predicted(model, STEPS["SFT, 2k"]).total
    for size, peak in NAMED.values():
        seconds = TOKENS * flops_per_token(model) * RECOMPUTED / (UTILIZATION * peak)
        yield duration(seconds) if held <= size * 2**30 - CONTEXT else "-"


def cells(model: Any) -> Iterator[str]:
    for tokens in STEPS.values():
        yield cell(predicted(model, tokens))
    yield f"{cell(predicted(model, STEPS['SFT, 2k'], ranks=2))} each"


def planned(shape: Shape) -> Any:
    """The model on meta with adapters of rank 16 on all linear layers, its layers fused."""
    plugin = QLoRAPlugin(dtype="bfloat16")
    with tempfile.TemporaryDirectory() as directory:
        config_of(shape).save_pretrained(directory)
        model = loading.planned(plugin, resolve.for_loop(plugin, directory)).model
    fast.fuse(model)
    return model


def config_of(shape: Shape) -> Any:
    """The configuration of a model of this shape."""
    return shape.config(
        hidden_size=shape.hidden, intermediate_size=shape.features, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied, head_dim=64 if shape.tied else 128, **shape.more,
    )  # fmt: skip


def predicted(model: Any, tokens: int, ranks: int = 1) -> Memory:
    workload = Workload(
        tokens=tokens, longest=tokens, optim="paged_adamw_32bit", accumulation=2, device="cuda"
    )
    if ranks > 1:
        workload = replace(workload, strategy="fsdp2", world_size=ranks)
    return memory.predict(model, workload, level=0)


def cell(found: Memory) -> str:
    """GiB, and the smallest card whose memory that is less than."""
    fitting = [size for size in CARDS if found.total <= size * 2**30 - CONTEXT]
    card = f"{fitting[0]} GB" if fitting else f"> {CARDS[-1]} GB"
    return f"{found.total / 2**30:.1f} ({card})"


if __name__ == "__main__":
    main()
