"""The memory model: on meta as loaded, optimizers' state as they make it, and shapes that others have published."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Trainer, TrainingArguments

from halfbyte import QLoRAPlugin, loading, memory, quantization, resolve
from halfbyte.memory import Peak, Workload, resident
from halfbyte.memory.measured import mapped_bytes
from tests.plain_trl import nf4

NF4 = nf4()
SHAPES = {  # hidden, feed-forward, layers, heads, key-value heads, vocabulary
    "Llama-65B": (8192, 22016, 80, 64, 64, 32_000),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128_256),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 151_936),
}


def planned(name: str, tmp_path: Path, **options) -> torch.nn.Module:
    hidden, features, layers, heads, kv_heads, vocabulary = SHAPES[name]
    LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=features, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128,
    ).save_pretrained(tmp_path)  # fmt: skip
    plugin = QLoRAPlugin(dtype="bfloat16", **options)
    return loading.planned(plugin, resolve.for_loop(plugin, str(tmp_path))).model


def test_on_meta_as_loaded(model_dir) -> None:
    for arch in ("llama", "qwen3", "opt"):
        plugin = QLoRAPlugin(dtype="float32")
        loaded = plugin.load(str(model_dir(arch)))
        on_meta = loading.planned(plugin, resolve.for_loop(plugin, str(model_dir(arch)))).model
        assert memory.is_planned(on_meta)
        assert memory.weights(on_meta) == memory.weights(loaded)
        assert quantization.measure_coverage(on_meta) == quantization.measure_coverage(loaded)


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_8bit", "sgd", "adafactor", "lion_32bit", "lion_8bit"]
)
def test_an_optimizer_s_state_is_what_it_makes(model_dir, tmp_path: Path, optim: str) -> None:
    model = QLoRAPlugin(dtype="float32", lora_r=64).load(str(model_dir("llama")))
    args = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True, report_to="none")
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = cls(trained, **options)
    for each in trained:
        each.grad = torch.ones_like(each)
    optimizer.step()
    made = sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.numel() > 1 and not name.startswith("qmap")
    )
    assert resident.optimizer_state(model, optim) == pytest.approx(made, rel=0.02)


@pytest.mark.parametrize("name", ["Llama-3.1-70B", "Qwen3-8B"])
def test_four_bits_and_the_constants_of_large_models(name: str, tmp_path: Path) -> None:
    """4.127 bits a weight at blocks of 64 (QLoRA, arXiv 2305.14314)."""
    hidden, features, layers, heads, kv_heads, _ = SHAPES[name]
    attention = 2 * hidden * heads * 128 + 2 * hidden * kv_heads * 128
    count = layers * (attention + 3 * hidden * features)
    found = memory.weights(planned(name, tmp_path))
    assert found.four_bit == count // 2
    assert 8 * (found.four_bit + found.quantization_state) / count == pytest.approx(4.127, abs=2e-3)


def test_65b_fits_48_gb_as_published(tmp_path: Path) -> None:
    """QLoRA (arXiv 2305.14314): 65B on one GPU of 48 GB, adapters of rank 64 on all linears, rows of 512 tokens."""
    model = planned("Llama-65B", tmp_path, lora_r=64)
    work = Workload(tokens=512, longest=512, optim="paged_adamw_32bit", device="cuda")
    found = memory.predict(model, work)
    assert 36 * 2**30 < found.total - found.pageable < 47.5 * 2**30


def test_70b_on_two_cards_of_24_gb(tmp_path: Path) -> None:
    """Sharded in four bits, half of the packed weights is on each rank, and the rest of the base is gathered."""
    model = planned("Llama-3.1-70B", tmp_path)
    one, two = (
        memory.predict(
            model, Workload(tokens=512, longest=512, optim="paged_adamw_32bit", device="cuda", **more)
        )
        for more in ({}, {"strategy": "fsdp2", "world_size": 2})
    )
    assert two.four_bit_weights == one.four_bit_weights // 2
    assert two.total < one.total * 2 / 3
    assert two.gathered > one.other_weights  # embeddings and head are whole while the root computes


def test_the_parts_add_up_and_shrink_with_the_level(tmp_path: Path) -> None:
    model = planned("Qwen3-8B", tmp_path)
    for tokens in (512, 8192):
        found = memory.predict(
            model, Workload(tokens=tokens, longest=tokens, optim="adamw_torch", device="cuda")
        )
        assert found.total == sum(found.parts().values())
        assert found.loaded < found.total


def test_a_peak_sees_what_is_allocated_and_freed() -> None:
    peak = Peak()
    peak.restart()
    block = torch.ones(512 * 2**20, dtype=torch.uint8)
    del block
    found = peak.bytes()
    assert found is not None
    # Less what the process gave back at the restart.
    assert 256 * 2**20 < found < 640 * 2**20


def test_weights_of_a_file_are_told_from_copies(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({"weight": torch.ones(256, 256)}, tmp_path / "model.safetensors")
    linear = torch.nn.Linear(256, 256, bias=False)
    assert mapped_bytes(linear) == 0
    linear.weight = torch.nn.Parameter(load_file(tmp_path / "model.safetensors")["weight"])
    assert mapped_bytes(linear) in (
        0,
        linear.weight.nbytes,
    )  # whether a file is mapped is the library's choice
