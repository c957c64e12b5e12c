"""The GPU benchmarks at a tiny shape, on the CPU: what they make, and that both sides take the same step."""

import math
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import plain_trl
from tests.benchmarks import bases, gpu, report
from tests.benchmarks.gpu import Part
from tests.benchmarks.variants import Step

TINY = {
    **{"hidden": 64, "layers": 2, "intermediate": 128, "heads": 4, "kv_heads": 2},
    **{"vocabulary": 512, "tokens": 32},
}
PARTS = [gpu.sized(part, TINY) for part in gpu.PARTS.values()]
FUSED = "2 layers fused (save level {}), 14 linears fused, chunked LM head, padding-free"


def test_sizes_that_are_not_given_stay() -> None:
    part = gpu.sized(gpu.FIT_32B, {"layers": 3, "tokens": 7, "cap": 5.0, "heads": None, "dtype": "float32"})
    assert part == replace(gpu.FIT_32B, shape=replace(bases.QWEN_32B, layers=3), rows=1, tokens=7, cap=5.0)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_base_is_made_packed(part: Part) -> None:
    """NF4 with double quantization, storage of its own for every layer, and the forward of what it stands for."""
    with bases.base(part.shape, part.tokens) as directory:
        model, again = plain_trl.base(directory), plain_trl.base(directory)
        config = AutoConfig.from_pretrained(directory)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    packed = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(packed) == 7 * part.shape.layers
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rest = {name: p for name, p in model.named_parameters() if not isinstance(p, bnb.nn.Params4bit)}
    dense.load_state_dict(rest, strict=False)
    for name, module in packed.items():
        state, wanted = module.weight.quant_state, dense.get_submodule(name).weight
        assert (state.quant_type, state.nested, state.shape) == ("nf4", True, wanted.shape)
        assert module.weight.dtype == torch.uint8
        assert 2 * module.weight.numel() == wanted.numel()
        assert torch.equal(module.weight, again.get_submodule(name).weight)
        wanted.data = bnb.functional.dequantize_4bit(module.weight.data, state)
        assert wanted.std().item() == pytest.approx(0.02, rel=0.1)
    for held in ("data", "absmax"):
        assert len({getattr(each.weight, held).data_ptr() for each in packed.values()}) == len(packed)
    first, last = (model.model.layers[i].mlp.up_proj.weight for i in (0, -1))
    assert not torch.equal(first, last)
    ids = torch.arange(4, 36).unsqueeze(0)
    # In training: in evaluation bitsandbytes repacks weights for some processors.
    difference = model.train()(ids).logits - dense.train()(ids).logits
    assert difference.abs().max() <= 1e-5
    assert (model.model.layers[0].self_attn.q_proj.bias is None) == (
        part.shape != gpu.sized(gpu.FIT_32B, TINY).shape
    )


@pytest.mark.parametrize(("part", "tokens"), [(gpu.SPEED, 64), (gpu.SPEED_DPO, 260)])
def test_speed_holds_halfbyte_to_the_step_that_trl_takes(part: Part, tokens: int) -> None:
    lines = gpu.speed(gpu.sized(part, TINY), "float32", repeats=2)
    assert [line.variant for line in lines] == [
        "TRL float32, checkpointing",
        "halfbyte float32, memory_budget 0MiB",
        "halfbyte float32",
    ]
    for line, level in zip(lines[1:], (0, 3), strict=True):
        assert line.path.startswith(f"fast: {FUSED.format(level)}")
        assert line.path.endswith(", 0 MiB in all")
        assert line.loss_difference is not None
        assert line.loss_difference <= 1e-5
        assert line.gradient_difference is not None
        assert 0 < line.gradient_difference <= 1e-5
    assert all([step.tokens for step in line.steps] == [tokens, tokens] for line in lines)


@pytest.mark.parametrize("part", [each for each in PARTS if each.cap], ids=lambda part: part.name)
def test_fit_takes_a_step_that_changes_every_adapter(part: Part) -> None:
    found = gpu.fit(part, "float32", "min")
    assert found.changed
    assert found.loss == pytest.approx(math.log(512), abs=0.5)
    assert found.path == f"fast: {FUSED.format(0)}, 0 MiB in all"
    # Without a GPU there is nothing under the cap, and nothing shown.
    assert f"| 0.0 | 0.0 | 0.0 | 0.0 | {part.cap} | NO |" in found.table()
    assert replace(found, reserved=int(23e9)).met
    assert not replace(found, reserved=int(49e9)).met


@pytest.mark.parametrize(("seconds", "memory", "met"), [(2.0, 90.0, "yes"), (3.0, 110.0, "NO")])
def test_speed_is_held_to_its_targets(seconds: float, memory: float, met: str) -> None:
    def line(name: str, seconds: float, memory: float) -> report.Line:
        return report.Line(name, [Step(1.0, seconds, 100)] * 3, 0.0, 0.0, memory, "")

    trl = line("TRL", 4.0, 100.0)
    told = gpu.speed_targets([trl, line("within", seconds, memory), line("auto", seconds, 300.0)], "sft")
    assert told[2:] == [
        f"| within | >= 1.4x | {4 / seconds:.2f}x | {met} |",
        f"| auto | >= 1.8x | {4 / seconds:.2f}x | {met} |",
        f"| peak memory of within | <= 1.0x | {memory / 100:.2f}x | {met} |",
    ]
