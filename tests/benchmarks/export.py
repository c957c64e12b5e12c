"""The memory of merging and quantizing: `python -m tests.benchmarks.export [--gigabytes 2]`.

A random Llama in bfloat16, in files of 256 MB, with a random adapter on all linear layers. RssAnon is read every 10 ms
in a process of its own; what counts is how much it grows above where the libraries are imported.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from halfbyte.export.shards import Shards
from tests import tiny

SHARD = 256 * 10**6


def base(directory: Path, size: int, *, hidden: int = 2048, inner: int = 5632) -> Path:
    """Write a base of about ``size`` bytes, one layer in memory at a time."""
    layer = 2 * (4 * hidden * hidden + 3 * hidden * inner)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=max(1, size // layer),
        num_attention_heads=16,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    directory.mkdir()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards = Shards(directory, SHARD)
    for name, weight in model.state_dict().items():
        shards.add({name: torch.randn(weight.shape, dtype=torch.bfloat16).mul_(0.02)})
    shards.finish()
    config.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def adapter(directory: Path, base: Path) -> Path:
    """Write an adapter of rank 16 on every linear layer of ``base``."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base))
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    tensors = {}
    for name in linears:
        if name != "lm_head":
            rows, columns = model.get_submodule(name).weight.shape
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(16, columns) * 0.01
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 16) * 0.01
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": 16,
        "lora_alpha": 32,
        "target_modules": sorted({name.rpartition(".")[2] for name in linears} - {"lm_head"}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def growth(words: list[str]) -> int:
    """Run ``halfbyte WORDS`` in a process of its own; return how many bytes of RssAnon it took at most."""
    command = [sys.executable, "-m", "tests.benchmarks.export", "--watch", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def watch(words: list[str]) -> int:
    """Run a command here, and return how RssAnon grew at most."""
    from halfbyte.cli import main
    from halfbyte.export import merge, quantize  # noqa: F401 - their imports are not what is measured

    begun, ended = anonymous(), threading.Event()
    most = [begun]

    def look() -> None:
        while not ended.wait(0.01):
            most[0] = max(most[0], anonymous())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    code = main(words)
    ended.set()
    thread.join()
    if code:
        raise SystemExit(code)
    return most[0] - begun


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def measure(size: int, directory: Path) -> dict[str, int]:
    """The growth of quantizing a base of ``size`` bytes, and of merging an adapter into it."""
    model = base(directory / "base", size)
    tuned = adapter(directory / "adapter", model)
    most = ["--max_shard_size", str(SHARD)]
    return {
        "quantize": growth(["quantize", str(model), "--output_dir", str(directory / "packed"), *most]),
        "merge": growth(
            ["merge", str(tuned), "--output_dir", str(directory / "merged"), "--measure", "none", *most]
        ),
    }


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--watch"]:
        print(watch(sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        size = int(options.gigabytes * 10**9)
        for name, grown in measure(size, Path(directory)).items():
            print(f"{name}: RssAnon grew by {grown / 1e6:,.0f} MB for a base of {size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
