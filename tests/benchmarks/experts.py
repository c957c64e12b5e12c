"""Measure how a base with experts is loaded in four bits: `python -m tests.benchmarks.experts [--write]`.

A random Qwen3-MoE in bfloat16, in files with a matrix an expert, as such models are published. Bytes are those of the
packed stacks with their scales; RssAnon is read every 10 ms in a process of its own that has imported before, from 16
bits and from the store.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from halfbyte.quantization import experts, load_base
from tests.benchmarks import machine, results, workload
from tests.benchmarks.watched import Watched
from tests.plain_trl import nf4

HIDDEN, WIDTH, EXPERTS, LAYERS = 1024, 1024, 32, 10
BITS = 4.127  # NF4, blocks of 64, double quantization (QLoRA, arXiv 2305.14314, section 3)
SPARE = 0.5e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--load", metavar="DIRECTORY", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.load:
        print(json.dumps(load(Path(asked.load))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        base = checkpoint(Path(scratch) / "base", asked.layers)
        environment = {**os.environ, "XDG_CACHE_HOME": str(Path(scratch) / "cache")}
        command = [sys.executable, "-m", "tests.benchmarks.experts", "--load", str(base)]
        found = []
        for _ in ("from 16 bits", "from the store"):
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    text = table(found, asked.layers, sys.argv[1:])
    print(text)
    if asked.write:
        results.write(text)


def checkpoint(directory: Path, layers: int) -> Path:
    """Write a random model layer by layer, each expert's matrices by themselves."""
    directory.mkdir()
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=HIDDEN, intermediate_size=WIDTH, moe_intermediate_size=WIDTH, num_experts=EXPERTS,
        num_experts_per_tok=4, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4, head_dim=64,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(directory)
    workload.tokenizer(4096).save_pretrained(directory)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    names: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in empty.state_dict().items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = tensor
    for file, tensors in shards.items():
        made: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if ".experts." not in name:
                made[name] = draw(*tensor.shape)
                continue
            prefix, kind = name.rsplit(".", 1)
            for index in range(EXPERTS):
                for part in ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",):
                    shape = (WIDTH, HIDDEN) if part != "down_proj" else (HIDDEN, WIDTH)
                    made[f"{prefix}.{index}.{part}.weight"] = draw(*shape)
        save_file(made, directory / file, metadata={"format": "pt"})
        names |= dict.fromkeys(made, file)
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def load(directory: Path) -> dict[str, Any]:
    """Load the base here; return what its experts take, and how RssAnon grew at most and at the end."""
    with Watched() as watched:
        begin = time.perf_counter()
        model = load_base(
            str(directory), quantization=nf4(), dtype=torch.bfloat16, device=torch.device("cpu")
        )
        seconds = time.perf_counter() - begin
    weights = size = 0
    for _, module, names in experts.modules(model):
        for name in names:
            stack = experts.packed(module, name)
            assert stack is not None
            assert stack.state is not None
            weights += stack.shape.numel()
            size += stack.data.nbytes
            size += sum(part.nbytes for part in stack.state.as_dict(packed=True).values())
    return {
        "weights": weights,
        "bytes": size,
        "peak": watched.growth,
        "held": watched.held(),
        "seconds": seconds,
    }


def table(found: list[dict[str, Any]], layers: int, words: list[str]) -> str:
    """The two loads as a Markdown section."""
    stack = 3 * EXPERTS * HIDDEN * WIDTH * 2
    rows = []
    for label, each in zip(("16 bits, as published", "the store"), found, strict=True):
        bound = each["bytes"] + 3 * stack + SPARE
        rows.append(
            f"| {label} | {each['bytes'] * 8 / each['weights']:.3f} | {each['peak'] / 1e6:,.0f} | {bound / 1e6:,.0f} "
            f"| {each['held'] / 1e6:,.0f} | {each['seconds']:.0f} |"
        )
    about = (
        f"A random Qwen3-MoE of {layers} layers with {EXPERTS} experts of {HIDDEN} x {WIDTH} each "
        f"({found[0]['weights'] / 1e9:.2f}B weights in experts, {2 * found[0]['weights'] / 1e9:.2f} GB in bfloat16). "
        f"{BITS} bits a weight are NF4 with double quantization; the bound is the 4-bit size, three times one layer's "
        f"experts in 16 bits ({stack / 1e6:.0f} MB) and 0.5 GB. A size of pages that a file backs is not counted: "
        "the store's weights are read through them."
    )
    return "\n".join(
        [
            results.EXPERTS, "", about, "", machine.run("experts", words, "one load each"), "",
            "| from | bits a weight | RssAnon grew by at most, MB | bound, MB | and held in the end, MB | s |",
            "|---|---|---|---|---|---|", *rows, "",
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
