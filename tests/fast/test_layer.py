"""A fused decoder layer equals the PEFT layer it stands for: values, gradients, masks, switches, refusals."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from halfbyte import fast
from halfbyte.fast import arguments, layer, varlen
from halfbyte.fast.attention_graph import GraphAttention
from halfbyte.fast.layer_call import LayerCall
from tests.fast import models

FAMILY = list(models.CONFIGS)
LENGTHS = [23, 17, 9]


def ids(rows: int = 3, length: int = 23, seed: int = 3) -> Tensor:
    return torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str) -> Tensor:
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    return mask if side == "right" else mask.flip(1)


def packed() -> dict[str, Tensor]:
    """One row of packed sequences, as TRL's padding-free collator makes it."""
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {
        "input_ids": ids(1, sum(LENGTHS)),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }


BATCHES = {
    "causal": {"input_ids": ids()},
    "right padding": {"input_ids": ids(), "attention_mask": padding("right")},
    "left padding": {"input_ids": ids(), "attention_mask": padding("left")},
    "packed": packed(),
}


def fuse_all(model: PeftModel, level: int = 0) -> PeftModel:
    assert set(models.fuse(model, level)) == {None}
    return model


def fell_back(model: PeftModel) -> list[str | None]:
    return [each.forward.reason for each in models.layers(model)]


def step(model: PeftModel, batch: dict[str, Tensor], seed: int = 5) -> dict[str, Tensor]:
    """Logits of real tokens, the gradients of a loss on them, and the next random number."""
    model.zero_grad()
    torch.manual_seed(seed)
    logits = model(**batch, use_cache=False).logits.float()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    (logits * weights)[real].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits[real].detach(), "next random": torch.rand(4), **gradients}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value.norm() > 0, name
        assert (ours[name] - value).norm() <= tolerance * value.norm(), name


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, str], dict[str, Tensor]]:
    """What the unfused models give for each architecture and batch."""
    found = {}
    for arch in FAMILY:
        model = models.make(arch)
        found.update({(arch, name): step(model, batch) for name, batch in BATCHES.items()})
    return found


@pytest.mark.parametrize("level", layer.LEVELS)
@pytest.mark.parametrize("arch", FAMILY)
def test_equals_the_unfused_layer(references: dict, arch: str, level: int) -> None:
    model = fuse_all(models.make(arch), level)
    for name, batch in BATCHES.items():
        assert_same(step(model, batch), references[arch, name])
        assert fell_back(model) == [None, None]


@pytest.mark.parametrize("level", layer.LEVELS)
def test_attention_with_a_graph_of_its_own(
    references: dict, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form of attention that CUDA takes."""
    monkeypatch.setattr(
        arguments, "attention", lambda device, dtype, *rest, cap, sinks: GraphAttention(*rest, cap, sinks)
    )
    for arch in ("llama", "qwen3", "deepseek"):
        model = fuse_all(models.make(arch), level)
        for name, batch in BATCHES.items():
            assert_same(step(model, batch), references[arch, name])


@pytest.mark.parametrize("level", layer.LEVELS)
def test_checkpointing_changes_nothing(references: dict, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse_all(models.make("llama"), level)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    apply, calls = LayerCall.apply, []
    monkeypatch.setattr(LayerCall, "apply", lambda *given: calls.append(given) or apply(*given))
    assert_same(step(model, BATCHES["causal"]), references["llama", "causal"])
    assert layer.fell_back(model) == {}
    assert len(calls) == models.SHAPE["num_hidden_layers"]  # none is computed again in the backward


@pytest.mark.parametrize("level", layer.LEVELS)
def test_dropout_draws_what_peft_draws(level: int) -> None:
    lora = {"lora_dropout": 0.3}
    expected = step(models.make("qwen2", **lora), BATCHES["causal"])
    assert_same(step(fuse_all(models.make("qwen2", **lora), level), BATCHES["causal"]), expected)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["up_proj", "down_proj"], "lora_dropout": 0.3},
        {"target_modules": ["o_proj"]},
        {"layers_to_transform": [0], "target_modules": ["q_proj", "k_proj", "gate_proj"]},
        {"rank_pattern": {"k_proj": 2, "up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"use_rslora": True, "lora_alpha": 2},
        {"target_modules": ["q_b_proj", "kv_a_proj_with_mqa"], "lora_dropout": 0.3},
        {"target_modules": ["q_a_proj", "kv_b_proj"], "rank_pattern": {"q_a_proj": 3}},
    ],
    ids=str,
)
def test_adapters_on_a_part_of_the_layer(lora: dict) -> None:
    arch = "deepseek" if any("_b_" in name for name in lora.get("target_modules", ())) else "llama_bias"
    for dense in (False, True):
        expected = step(models.make(arch, dense=dense, **lora), BATCHES["right padding"])
        model = fuse_all(models.make(arch, dense=dense, **lora))
        assert_same(step(model, BATCHES["right padding"]), expected)
        assert fell_back(model) == [None, None]


def test_first_layer_without_a_gradient_for_its_input(references: dict) -> None:
    model = fuse_all(models.make("llama"))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    assert_same(step(model, BATCHES["causal"]), references["llama", "causal"])


def bfloat16_errors(arch: str, level: int | None) -> float:
    """Relative error of the adapters' gradients in bfloat16, against float32 with the same weights."""
    exact = models.make(arch, torch.bfloat16).float()
    for module in exact.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    rounded = models.make(arch, torch.bfloat16)
    if level is not None:
        fuse_all(rounded, level)
    wrong, total = 0.0, 0.0
    for seed in range(3):
        batch = {"input_ids": ids(seed=seed)}
        reference = step(exact, batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = step(rounded, batch)
        for name in (name for name in reference if "lora_" in name):
            wrong += (found[name] - reference[name]).square().sum().item()
            total += reference[name].square().sum().item()
    return (wrong / total) ** 0.5


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma", "deepseek"])
def test_bfloat16_is_as_exact_as_unfused(arch: str) -> None:
    for level in (0, 3):
        assert 0 < bfloat16_errors(arch, level) <= 1.1 * bfloat16_errors(arch, None)


def test_adapters_can_be_switched() -> None:
    """Disabled, another one active, several active, merged: each as PEFT does it."""
    outputs = []
    for fused in (False, True):
        model = models.make("llama").eval()
        model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        models.randomize(model, seed=2)
        if fused:
            fuse_all(model)
        found, reasons = [], []
        with torch.no_grad():

            def run(model=model, found=found, reasons=reasons, fused=fused) -> None:
                found.append(model(**BATCHES["causal"], use_cache=False).logits)
                reasons.append(fell_back(model)[0] if fused else None)

            run()
            with model.disable_adapter():
                run()
            model.set_adapter("ref")
            run()
            model.base_model.set_adapter(["default", "ref"])
            run()
            model.set_adapter("default")
            model.merge_adapter()
            run()
        outputs.append(found)
    assert reasons == [None, None, None, "several adapters are active", "adapters are merged"]
    for theirs, ours in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 0.01


def test_generation_uses_the_cache() -> None:
    expected = models.make("qwen3").eval().generate(ids(2, 5), max_new_tokens=4, do_sample=False)
    model = fuse_all(models.make("qwen3").eval())
    assert torch.equal(model.generate(ids(2, 5), max_new_tokens=4, do_sample=False), expected)
    assert fell_back(model) == ["a KV cache"] * 2


def test_sliding_window() -> None:
    options = {"config": {"sliding_window": 8}}
    expected, model = models.make("mistral", **options), fuse_all(models.make("mistral", **options))
    for batch in (BATCHES["causal"], BATCHES["packed"]):
        assert_same(step(model, batch), step(expected, batch))
        assert fell_back(model) == [None, None]


def test_boundaries_from_the_mask_of_padding_free_batches(references: dict) -> None:
    """:mod:`halfbyte.fast.varlen` hands over boundaries as a mask of cumulative lengths."""
    varlen.register()
    for arch in ("llama", "qwen3"):
        model = fuse_all(models.make(arch))
        model.get_base_model().set_attn_implementation(varlen.IMPLEMENTATION)
        batch = {name: BATCHES["packed"][name] for name in ("input_ids", "position_ids")}
        assert_same(step(model, batch), references[arch, "packed"])
        assert fell_back(model) == [None, None]


def test_boundaries_from_positions_under_flash_attention(references: dict) -> None:
    """transformers reads them off the positions, and a fused layer runs without flash attention installed."""
    model = fuse_all(models.make("llama"))
    model.get_base_model().config._attn_implementation = "flash_attention_2"
    batch = {name: BATCHES["packed"][name] for name in ("input_ids", "position_ids")}
    assert_same(step(model, batch), references["llama", "packed"])
    assert_same(step(model, BATCHES["causal"]), references["llama", "causal"])
    assert fell_back(model) == [None, None]


def test_copies_are_independent() -> None:
    model = fuse_all(models.make("llama"))
    twin = copy.deepcopy(model)
    before = model(**BATCHES["causal"], use_cache=False).logits
    models.randomize(twin, seed=9)
    after = twin(**BATCHES["causal"], use_cache=False).logits
    assert (before - after).abs().max() > 0.01
    assert models.layers(twin)[0].forward.module is models.layers(twin)[0]
    assert model.state_dict().keys() == models.make("llama").state_dict().keys()


def test_unfuse(references: dict) -> None:
    model = fuse_all(models.make("llama"))
    for each in models.layers(model):
        layer.unfuse(each)
    assert "forward" not in vars(models.layers(model)[0])
    assert_same(step(model, BATCHES["causal"]), references["llama", "causal"])


def test_what_is_not_covered_says_why() -> None:
    def reason(arch: str = "llama", **options) -> str | None:
        return models.fuse(models.make(arch, **options))[0]

    assert reason() is None
    assert reason(use_dora=True) == "q_proj: Dora adapter"
    assert reason(config={"hidden_act": "mish"}) == "activation MishActivation"
    assert reason(config={"attn_implementation": "eager"}) == "attention implementation eager"
    assert reason(lora_bias=True, bias="none") == "q_proj: adapter with a bias"
    assert reason(modules_to_save=["input_layernorm"]) is not None


def test_attention_dropout_goes_to_the_original() -> None:
    model = fuse_all(models.make("llama", config={"attention_dropout": 0.1}))
    step(model, BATCHES["causal"])
    assert fell_back(model) == ["dropout inside attention"] * 2
    assert layer.fell_back(model) == {"dropout inside attention": 2}
    model.eval()(**BATCHES["causal"], use_cache=False)
    assert fell_back(model) == [None, None]


@pytest.mark.parametrize("linears_only", [False, True])
def test_an_output_may_be_changed_in_place(linears_only: bool) -> None:
    """Gemma 3n multiplies what a projection returns in place."""
    found = []
    for fused in (False, True):
        model = models.make("llama")
        if fused and linears_only:
            assert fast.fuse(model, scope=fast.Scope(frozenset({"linears"}))).linears == 14
        elif fused:
            fuse_all(model)
        changed = models.layers(model)[0].mlp.up_proj if linears_only else models.layers(model)[0]
        changed.register_forward_hook(lambda module, args, output: output.mul_(2))
        found.append(step(model, BATCHES["causal"]))
    assert_same(found[1], found[0])
