"""The fused NF4+LoRA linear equals PEFT's in values, gradients, dropout masks and random numbers drawn."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit
from torch import nn

from halfbyte.fast import linear


class Net(nn.Module):
    """Two 4-bit linears with a nonlinearity that makes exact zeros, as OPT's second linear sees them."""

    def __init__(self, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        options = {"bias": bias, "compute_dtype": dtype, "compress_statistics": True, "quant_type": "nf4"}
        self.up = bnb.nn.Linear4bit(64, 128, **options)
        self.down = bnb.nn.Linear4bit(128, 64, **options)
        self.is_loaded_in_4bit = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def make(*, dtype: torch.dtype = torch.float32, bias: bool = False, fused: bool = True, **lora) -> nn.Module:
    torch.manual_seed(0)
    net = Net(dtype, bias).to(dtype)
    for module in (net.up, net.down):
        module.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        module.support_avx512bf16_for_cpu = False
    model = get_peft_model(net, LoraConfig(r=8, lora_alpha=16, target_modules=["up", "down"], **lora))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
    if fused:
        assert sum(linear.fuse(module) for module in model.modules()) == 2
    return model


def step(model: nn.Module, x: torch.Tensor, seed: int = 1) -> dict[str, torch.Tensor]:
    """Output, all gradients, and the next random number."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    after = torch.rand(1)
    (y.float() * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    found = {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }
    return {"y": y.detach(), "dx": x.grad, "random": after, **found}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    assert len(a) > 3
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm(), name


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_peft(x: torch.Tensor, dropout: float, bias: bool) -> None:
    fused = step(make(bias=bias, lora_dropout=dropout), x)
    assert_same(fused, step(make(bias=bias, lora_dropout=dropout, fused=False), x))
    assert all(gradient.norm() > 0 for name, gradient in fused.items() if "lora_" in name)


def test_an_input_that_is_not_row_major_drops_the_same_elements() -> None:
    x = torch.randn(1, 64, 17, generator=torch.Generator().manual_seed(3)).transpose(1, 2)
    assert not x.is_contiguous()
    fused, peft = (step(make(lora_dropout=0.3, fused=fused), x) for fused in (True, False))
    assert_same(fused, peft)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_variants_equal_peft(x: torch.Tensor, options: dict) -> None:
    if "lora_bias" in options:
        options["bias"] = True
    assert_same(step(make(**options), x), step(make(fused=False, **options), x))


def test_bfloat16_is_as_close_to_float32_as_peft(x: torch.Tensor) -> None:
    exact = step(make(), x)

    def error(fused: bool) -> float:
        # Adapters in float32 on a bfloat16 base, and autocast as the Trainer turns it on for plain PEFT.
        model = make(dtype=torch.bfloat16, fused=fused)
        with torch.autocast("cpu", torch.bfloat16, enabled=not fused):
            found = step(model, x.bfloat16())
        names = [name for name in exact if "lora_" in name]
        assert all(found[name].dtype == torch.float32 for name in names)
        return sum(((found[n] - exact[n]).norm() / exact[n].norm()).item() for n in names)

    assert error(fused=True) <= 1.1 * error(fused=False)


def test_inside_autocast_computes_in_its_dtype(x: torch.Tensor) -> None:
    results = []
    for fused in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(make(fused=fused), x))
    assert_same(*results, tolerance=2e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_under_non_reentrant_checkpointing(x: torch.Tensor, dropout: float) -> None:
    model = make(lora_dropout=dropout)
    plain = step(model, x)
    inner = model.base_model.model.forward
    model.base_model.model.forward = lambda x: torch.utils.checkpoint.checkpoint(
        inner, x, use_reentrant=False
    )
    assert_same(step(model, x), plain, tolerance=0)


def test_disabled_switched_and_several_adapters(x: torch.Tensor) -> None:
    models = [make(fused=fused) for fused in (True, False)]
    for model in models:
        model.add_adapter("ref", LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False))
    ref = {n: p for n, p in models[0].named_parameters() if ".ref." in n}
    for name, parameter in models[1].named_parameters():
        if name in ref:
            parameter.data.copy_(ref[name])

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        found = [model(x)]
        with model.disable_adapter():
            found.append(model(x))
        model.set_adapter("ref")
        found.append(model(x))
        model.base_model.set_adapter(["default", "ref"])
        found.append(model(x))
        model.set_adapter("default")
        return [*found, model(x)]

    with torch.no_grad():
        ours, theirs = outputs(models[0]), outputs(models[1])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(ours[0], ours[-1])
    assert not torch.allclose(ours[0], ours[2], atol=1e-3)


def test_a_copy_is_fused_and_independent(x: torch.Tensor) -> None:
    model = make()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    assert not torch.allclose(model(x), other(x), atol=1e-3)
    assert [type(m) for m in other.modules()].count(linear.FusedLinear4bit) == 2


def test_unfuse_gives_pefts_class_back() -> None:
    model = make()
    for module in model.modules():
        linear.unfuse(module)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(Linear4bit) == 2
    assert linear.FusedLinear4bit not in kinds


def test_frozen_adapter_and_input_need_no_gradients(x: torch.Tensor) -> None:
    model = make()
    model.base_model.model.up.lora_A.default.weight.requires_grad_(False)
    model(x).sum().backward()
    assert model.base_model.model.up.lora_A.default.weight.grad is None
    assert model.base_model.model.up.lora_B.default.weight.grad.norm() > 0
