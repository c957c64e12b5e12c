"""Fused experts compute what the same weights kept dense do, in every family, with adapters and without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from halfbyte.errors import UserError
from halfbyte.fast import experts as fused
from halfbyte.fast import grouped_experts
from halfbyte.quantization import stacks_of
from tests import experts, tiny

IDS = torch.randint(4, tiny.VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))
MIXERS = {"q_proj", "v_proj", "o_proj", "q_b_proj", "in_proj", "in_proj_qkvz", "in_proj_qkv"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """A family's tiny base in four bits, and a copy with the rounded weights kept dense."""

    def make(family: str) -> tuple[Any, Any]:
        directory = experts.save(tmp_path_factory.mktemp(family), family)
        packed = experts.load(directory)
        return packed, experts.rounded(directory, packed)

    return make


def adapted(model: nn.Module, like: nn.Module | None = None, *, stacks: tuple[str, ...] = ()) -> Any:
    """``model`` with adapters of random values, or of those of ``like``."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=names & MIXERS,
        target_parameters=list(stacks) or None,
        task_type="CAUSAL_LM",
    )
    found = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    theirs = dict(like.named_parameters()) if like is not None else {}
    for name, parameter in found.named_parameters():
        if parameter.requires_grad:
            value = theirs.get(name)
            parameter.data = (
                0.05 * torch.randn(parameter.shape, generator=generator)
                if value is None
                else value.data.clone()
            )
    return found


def fuse(model: PeftModel) -> int:
    fused.require(model)
    return sum(fused.fuse(module, held) for _, module, held in fused.within(model))


def gradients(model: Any, *, checkpointing: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def assert_same(found: tuple[float, dict], expected: tuple[float, dict]) -> None:
    assert abs(found[0] - expected[0]) <= 1e-6 * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name
    ours, theirs = (torch.cat([each.flatten() for each in grads.values()]) for _, grads in (found, expected))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


FAMILIES = [
    *experts.FAMILIES,
    *(pytest.param(name, marks=pytest.mark.faults) for name in experts.MORE),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_are_those_of_dense_rounded_experts(pair, family: str) -> None:
    packed, dense = pair(family)
    stacks = tuple(sorted({".".join(path.split(".")[-2:]) for path in stacks_of(packed)}))
    for wanted in ((), stacks):
        reference = adapted(dense, stacks=wanted)
        model = adapted(packed, reference, stacks=wanted)
        assert fuse(model) > 0
        expected = gradients(reference)
        assert_same(gradients(model), expected)
        assert_same(gradients(model, checkpointing=True), expected)
        packed, dense = model.unload(), reference.unload()
        for module in packed.modules():
            fused.unfuse(module)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "aria_text"])
@pytest.mark.filterwarnings("ignore")
def test_experts_in_groups_as_on_a_gpu(pair, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_experts, "is_used", lambda device, maps: True)
    packed, dense = pair(family)
    stacks = tuple(sorted({".".join(path.split(".")[-2:]) for path in stacks_of(packed)}))
    reference = adapted(dense, stacks=stacks)
    model = adapted(packed, reference, stacks=stacks)
    assert fuse(model) > 0
    assert_same(gradients(model), gradients(reference))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_transformers_own_implementations_read_packed_stacks(pair, implementation: str) -> None:
    packed, dense = pair("qwen3_moe")
    reference = adapted(dense)
    model = adapted(packed, reference)
    packed.set_experts_implementation(implementation)
    dense.set_experts_implementation(implementation)
    for checkpointing in (False, True):
        assert_same(
            gradients(model, checkpointing=checkpointing), gradients(reference, checkpointing=checkpointing)
        )


def test_plain_peft_loads_the_adapter_on_a_dense_base_and_gives_the_same_logits(pair, tmp_path: Path) -> None:
    packed, dense = pair("mixtral")
    model = adapted(packed, stacks=("experts.gate_up_proj", "experts.down_proj"))
    fused.require(model)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(dense, str(tmp_path)).eval()
    with torch.no_grad():
        found, expected = model.eval()(IDS).logits, plain(IDS).logits
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    with plain.disable_adapter(), torch.no_grad():
        assert (plain(IDS).logits - expected).norm() > 1e-3 * expected.norm()


def test_a_second_adapter_is_put_on_experts_too_and_adapters_off_is_the_base(pair) -> None:
    packed, dense = pair("qwen3_moe")
    model = adapted(packed, stacks=("experts.down_proj",))
    fused.require(model)
    model.add_adapter("ref", model.peft_config["default"])
    assert any("experts" in name and ".ref." in name for name, _ in model.named_parameters())
    with torch.no_grad():
        with model.disable_adapter():
            off = model.eval()(IDS).logits
        expected = dense.eval()(IDS).logits
        model.set_adapter("ref")
        fresh = model(IDS).logits
    assert (off - expected).norm() <= 1e-6 * expected.norm()
    # B of the second is zero, A of both are active one at a time.
    assert (fresh - expected).norm() <= 1e-6 * expected.norm()


def test_an_expert_that_no_token_reaches_has_zero_gradients(pair) -> None:
    packed, _ = pair("qwen3_moe")
    model = adapted(packed, stacks=("experts.gate_up_proj",))
    fused.require(model)
    layer = packed.model.layers[0].mlp
    wrapper = layer.experts
    tokens = torch.randn(5, 64, requires_grad=True)
    index = torch.tensor([[0, 1]] * 5)
    wrapper(tokens, index, torch.full((5, 2), 0.5)).sum().backward()
    a = wrapper.lora_A["default"].weight.grad.view(4, 4, 64)
    assert a[:2].abs().sum() > 0
    assert a[2:].abs().sum() == 0


def test_peft_still_leaves_its_update_on_a_parametrized_parameter(pair) -> None:
    """When this fails, adapters on packed experts need not be computed here."""
    packed, _ = pair("qwen3_moe")
    model = adapted(packed, stacks=("experts.gate_up_proj",)).eval()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="Could not find any LoRA parametrization"):
            first = model(IDS).logits
        assert not torch.allclose(first, model(IDS).logits)


def test_experts_that_are_computed_in_another_way_take_no_adapters(pair) -> None:
    packed, _ = pair("qwen3_moe")
    model = adapted(packed, stacks=("experts.gate_up_proj",))
    for module in packed.modules():
        if hasattr(module, "has_post_expert_norm"):
            module.has_post_expert_norm = True
    with pytest.raises(UserError, match="Qwen3MoeExperts computes its experts in a way of its own") as error:
        fused.require(model)
    assert error.value.option == "lora_target_parameters"
