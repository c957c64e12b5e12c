"""Stacks of experts in four bits: packed as they are read, bitwise as bitsandbytes packs them, and stored so."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from halfbyte import store
from halfbyte.cli import main
from halfbyte.errors import UserError
from halfbyte.quantization import experts, load_base, measure_coverage, packed, planned, stacks_of
from halfbyte.quantization.skeleton import without_weights
from halfbyte.quantization.stacks_in_peft import shown_whole
from halfbyte.task import CAUSAL_LM
from tests import tiny
from tests.architectures import save
from tests.experts import load, save_mxfp4
from tests.plain_trl import nf4

STACKS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("experts"), "qwen3_moe")


def of(model: Any, name: str, layer: int = 0) -> experts.Stack:
    found = experts.packed(model.model.layers[layer].mlp.experts, name)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_packed_as_bitsandbytes_packs_the_whole_of_it(base: Path, dtype: torch.dtype) -> None:
    model, dense = load(base, dtype), AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    for name in STACKS:
        weights = getattr(dense.model.layers[1].mlp.experts, name).data
        data, state = bnb.functional.quantize_4bit(weights, compress_statistics=True, quant_type="nf4")
        stack = of(model, name, 1)
        assert torch.equal(stack.data, data)
        found = stack.state.as_dict(packed=True)
        for part, expected in state.as_dict(packed=True).items():
            assert torch.equal(found[part], expected), part
        whole = bnb.functional.dequantize_4bit(data, state)
        assert torch.equal(stack.whole(dtype), whole)
        assert torch.equal(getattr(model.model.layers[1].mlp.experts, name), whole)
        scales = stack.scales()
        for index in range(len(weights)):
            assert torch.equal(stack.expert(index, scales, dtype), whole[index])


def test_the_stored_base_is_the_one_that_was_quantized_bit_for_bit(base: Path) -> None:
    first = load(base).state_dict()
    again = load(base).state_dict()
    assert any(name.endswith("experts.gate_up_proj.absmax") for name in again)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_checkpoint_that_is_packed_already_loads_with_its_own_bytes(base: Path, tmp_path: Path) -> None:
    model = load(base)
    model.save_pretrained(tmp_path / "packed", save_original_format=False)
    tiny.tokenizer().save_pretrained(tmp_path / "packed")
    found, expected = load(tmp_path / "packed").state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_conversions_of_the_model_s_own_leave_packed_stacks_alone(tmp_path: Path) -> None:
    """transformers transposes stacks of qwen3_vl_moe as it reads them, and took their scales for stacks."""
    base, packed = save(tmp_path / "base", "qwen3_vl_moe"), tmp_path / "packed"
    before = len(store.entries())
    expected = load(base).state_dict()
    assert len(store.entries()) == before + 1
    assert main(["quantize", base, "--output_dir", str(packed), "--dtype", "float32"]) == 0
    for found in (load(base).state_dict(), load(packed).state_dict()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_coverage_counts_what_is_packed(base: Path) -> None:
    coverage = measure_coverage(load(base))
    assert coverage.four_bit_share == 1.0
    assert set(coverage.left_out) == {"embeddings", "head", "norms and biases", "routers"}


def test_bytes_of_a_stack_are_four_and_an_eighth_bits_a_weight() -> None:
    weights = torch.randn(16, 512, 256)
    template = bnb.nn.Params4bit(weights.to("meta"), quant_type="nf4", compress_statistics=True)
    made = experts.pack(weights, template)
    parts = made.quant_state.as_dict(packed=True)
    size = made.data.nbytes + sum(tensor.nbytes for tensor in parts.values())
    assert size * 8 / weights.numel() == pytest.approx(4.127, rel=0.03)


def test_experts_of_a_size_that_blocks_would_cross_stay_in_16_bits(tmp_path: Path) -> None:
    config = tiny.CONFIGS["qwen3_moe"]()
    config.hidden_size, config.moe_intermediate_size = 24, 3
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    coverage = measure_coverage(load(tmp_path))
    assert coverage.unquantized_classes == ("Qwen3MoeExperts",)
    with pytest.raises(UserError, match=r"% of the decoder.*experts\.gate_up_proj"):
        coverage.require()


def test_without_weights_the_stacks_have_their_shapes(base: Path) -> None:
    model = without_weights(base, quantization=nf4(), dtype=torch.float32, task=CAUSAL_LM)
    assert stacks_of(model) == stacks_of(load(base))
    assert measure_coverage(model).bytes_4bit == measure_coverage(load(base)).bytes_4bit


def test_the_parts_of_a_packed_parameter_have_its_name() -> None:
    path = "model.layers.0.mlp.experts.gate_up_proj"
    for part in ("", ".absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"):
        assert packed.parameter_of(path + part) == path
    assert packed.parameter_of("model.norm.weight") == "model.norm.weight"


def test_shown_whole_a_stack_is_a_parameter_of_its_shape_and_afterwards_packed_again(base: Path) -> None:
    model: Any = load(base)
    held, before = model.model.layers[0].mlp.experts, model.state_dict()
    with shown_whole(model):
        assert held.gate_up_proj.shape == (4, 128, 64)
        assert "gate_up_proj" in dict(held.named_parameters(recurse=False))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_peft_still_finds_parametrized_parameters_by_whole_paths_only(base: Path) -> None:
    """When this fails, ``quantization/stacks_in_peft.py`` can go."""
    from peft.tuners.tuners_utils import BaseTuner

    model = load(base)
    own = BaseTuner._inject_parameters.__wrapped__  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseTuner, "_inject_parameters", own)
        found = get_peft_model(
            model, LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
        )
        assert not any("experts" in name and "lora_" in name for name, _ in found.named_parameters())
        of_a_layer = LoraConfig(target_modules=[], target_parameters=["q_proj.weight"])
        twice = get_peft_model(load(base), of_a_layer)
        with pytest.raises(ValueError, match="which is not a valid target"):
            twice.add_adapter("another", of_a_layer)


def test_a_layer_that_its_weight_and_its_name_target_is_refused_as_in_16_bits(base: Path) -> None:
    both = LoraConfig(target_modules=["q_proj"], target_parameters=["q_proj.weight"])
    for model in (AutoModelForCausalLM.from_pretrained(base), load(base)):
        with pytest.raises(ValueError, match="this layer is not also targeted"):
            get_peft_model(model, both)
    twice = get_peft_model(load(base), LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]))
    with pytest.raises(ValueError, match="this layer is not also targeted"):
        twice.add_adapter("another", both)


def test_two_targets_of_one_weight_draw_a_further_adapter_once(base: Path) -> None:
    drawn = []
    for targets in (["q_proj.weight"], ["q_proj.weight", "self_attn.q_proj.weight"]):
        config = LoraConfig(target_modules=[], target_parameters=targets)
        model = get_peft_model(load(base), config)
        torch.manual_seed(0)
        model.add_adapter("another", config)
        drawn.append({name: value for name, value in model.named_parameters() if ".another." in name})
    once, twice = drawn
    assert once.keys() == twice.keys() != set()
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_the_store_keeps_one_entry_a_base(base: Path) -> None:
    load(base)
    count = len(store.entries())
    load(base)
    assert len(store.entries()) == count


def test_mxfp4_is_dequantized_and_packed_as_it_is_read(tmp_path: Path) -> None:
    directory = tmp_path / "base"
    expected = {}
    for name, dense in save_mxfp4(directory).items():
        template = bnb.nn.Params4bit(dense.to("meta"), quant_type="nf4", compress_statistics=True)
        expected[name] = experts.pack(dense, template)
    for model in (load(directory), load(directory)):  # from MXFP4, and from the store
        assert measure_coverage(model).four_bit_share == 1.0
        for name, stack in expected.items():
            path, _, leaf = name.rpartition(".")
            found = experts.packed(model.get_submodule(path), leaf)
            assert found is not None
            assert torch.equal(found.data, stack.data)
            assert torch.equal(
                found.whole(torch.float32), experts.Stack(stack, stack.quant_state).whole(torch.float32)
            )
    on_meta = planned(str(directory), quantization=nf4(), dtype=torch.float32)
    assert measure_coverage(on_meta).bytes_4bit == measure_coverage(model).bytes_4bit
    plain = without_weights(directory, quantization=None, dtype=torch.float32, task=CAUSAL_LM)
    assert not hasattr(plain.config, "quantization_config"), "what a merge writes is not quantized"
    given: dict[str, Any] = {"quantization": nf4(), "dtype": torch.float32, "num_experts_per_tok": 1}
    model = load_base(str(directory), device=torch.device("cpu"), **given)
    assert (
        model.config.num_experts_per_tok == planned(str(directory), **given).config.num_experts_per_tok == 1
    )
    with pytest.raises(UserError, match=r"in MXFP4, .*write `load_in_4bit: true`"):
        load_base(str(directory), quantization=None, dtype=torch.float32, device=torch.device("cpu"))


def test_more_weights_than_kernels_count_are_dequantized_by_expert(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = of(load(base), "gate_up_proj")
    expected = stack.whole(torch.float32)
    monkeypatch.setattr(experts, "_MOST", 100)
    assert torch.equal(stack.whole(torch.float32), expected)
