"""Layers that are fused from their description: loss and gradients equal those of the model's own forward."""

from collections.abc import Container, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import DeepseekV3Config, Gemma3TextConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2Model

from halfbyte import fast
from halfbyte.fast import batches, layer
from halfbyte.fast.forest import ROOT, Forest
from halfbyte.fast.proof import Proofs
from tests import architectures
from tests.fast import models
from tests.fast.test_layer import BATCHES

# Attention in a short window in one layer and in none in the other.
_MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# What is set beside the tiny configuration of `tests.architectures`, in the quick tests and in the long ones.
QUICK: dict[str, dict[str, Any]] = {
    "cohere2": _MIXED,
    "ernie4_5": {"use_bias": True},
    "gemma2": {**_MIXED, "attn_logit_softcapping": 2.0},
    "glm4": {"attention_bias": True},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2},
    "minicpm3": {"v_head_dim": 24, "scale_depth": 0.5},
    "ministral3": {"sliding_window": 8},
    "nemotron": {"mlp_bias": True},
    "olmo2": {},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
}
LONG: dict[str, dict[str, Any]] = {
    "cohere": {},
    "exaone4": {**_MIXED, "sliding_window_pattern": "LG"},
    "gemma3_text": _MIXED,
    "gemma4_text": {**_MIXED, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
    "glm": {"attention_bias": True},
    "granite_swa": _MIXED,
    "gpt_neox": {"attention_bias": True},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "hunyuan_v1_dense": {},
    "hyperclovax": {"use_post_norm": True},
    "ministral": {"sliding_window": 8},
    "olmo": {},
    "olmo3": _MIXED,
    "opt": {"dropout": 0.0},
    "persimmon": {},
    "phi": {},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "stablelm": {"use_parallel_residual": True, "use_qkv_bias": True},
    "starcoder2": {"residual_dropout": 0.0, "sliding_window": 8},
    "vaultgemma": {"attn_logit_softcapping": 2.0},
    "youtu": {"rope_interleave": True, "attention_bias": True},
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
         "mscale_all_dim": 1.0}  # fmt: skip
# Layers of which a part is fused: what is set, how many whole layers there are, and how many parts.
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
HALVES: dict[str, tuple[dict[str, Any], int, dict[str, int]]] = {
    "qwen3_next": (_HYBRID, 0, {"attention": 1, "MLP": 2}),
    "lfm2": ({}, 1, {"MLP": 1}),
    "qwen3_5_text": (_HYBRID, 1, {"MLP": 1}),
    "granitemoehybrid": ({"layer_types": ["mamba", "attention"], "num_local_experts": 0}, 1, {"MLP": 1}),
    "nemotron_h": ({}, 0, {"attention": 1, "MLP": 2}),
    "qwen3_moe": ({}, 0, {"attention": 2}),
    "mixtral": ({}, 0, {"attention": 2}),
    "olmoe": ({}, 0, {"attention": 2}),
    "glm4_moe": ({}, 1, {"attention": 1, "MLP": 1}),
    "deepseek_v2": ({"q_lora_rank": None, "v_head_dim": 40}, 1, {"attention": 1, "MLP": 1}),
    "deepseek_v3": ({"rope_parameters": _YARN, "v_head_dim": 24}, 1, {"attention": 1, "MLP": 1}),
    "kimi_linear": (_HYBRID, 0, {"attention": 1, "MLP": 2}),
    "deepseek_v32": ({}, 0, {"MLP": 2}),  # its indexer chooses the keys
    "gpt_oss": (_MIXED, 0, {"attention": 2}),
}
_LINEARS = (
    ".*(q_proj|k_proj|v_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj"
    "|w1|w2|w3|input_linear|output_linear)"
)


def in_tiers(names: Iterable[str], quick: Container[str]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.faults) for name in names]


TRIED = ("right padding", "packed")


def make(name: str, config: dict[str, Any] | None = None, **lora: Any) -> PeftModel:
    """A 4-bit model of the architecture ``name`` with random norms, biases and adapters."""
    base = architectures.model(name, **{**(QUICK | LONG).get(name, {}), **(config or {})})
    torch.manual_seed(0)
    for parameter in base.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.data.mul_(3)
    for norm_name, parameter in base.named_parameters():
        if norm_name.endswith("k_norm.weight"):  # or large scores leave less than six digits
            parameter.data.mul_(0.3)
    for buffer_name, buffer in base.named_buffers():
        if buffer_name.endswith("layer_scalar"):
            buffer.fill_(0.8)
    models.quantize(base, torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    models.randomize(model)
    return model.train()


def step(model: PeftModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss on real tokens, and the gradients."""
    model.zero_grad()
    torch.manual_seed(5)
    logits = model(**batch, use_cache=False).logits.float()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    loss = functional.cross_entropy(logits[real], batch["input_ids"][real])
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value.norm() > 0, name
        tolerance = 1e-6 if name == "loss" else 1e-5
        assert (ours[name] - value).norm() <= tolerance * value.norm(), name


def fuse(model: PeftModel) -> fast.FusionReport:
    return fast.fuse(model, scope=fast.Scope(frozenset({"layers"})))


@pytest.mark.parametrize("name", in_tiers([*QUICK, *LONG], QUICK))
def test_a_described_layer_computes_what_its_model_does(name: str) -> None:
    """Over variable lengths and packed sequences, at every save level."""
    lora = {"lora_dropout": 0.2} if name == "granite" else {}
    expected = make(name, **lora)
    if name == "opt":  # which makes its mask without looking at positions
        assert batches.use_forests(expected.get_base_model()) is None
    references = {each: step(expected, BATCHES[each]) for each in TRIED}
    model = make(name, **lora)
    report = fuse(model)
    assert (report.layers, dict(report.layers_apart)) == (2, {})
    for level in layer.LEVELS:
        for forward in layer.fused_layers(model):
            forward.level = level
        for each in TRIED:
            assert_same(step(model, BATCHES[each]), references[each])
    assert layer.fell_back(model) == {}


# A pair of which the prefix is read from its last token on, and a row alone of which nothing is read.
TREE = Forest.of_lengths([9, 4, 5, 3], [ROOT, 0, 0, ROOT])
READ = replace(TREE, read_from=(8, 9, 14, 21))


def read(model: PeftModel, forest: Forest) -> dict[str, Tensor]:
    """The hidden states that are read of ``forest``, and the gradients of a loss on them."""
    model.zero_grad()
    hidden = model.get_base_model().base_model(
        input_ids=torch.arange(1, 22)[None],
        position_ids=TREE.positions(),
        attention_mask=forest.tensor(),
        use_cache=False,
    )[0]
    if forest.read_from is None:
        hidden = hidden[:, [8, *range(9, 13), *range(14, 18)]]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
    (hidden * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **gradients}


@pytest.mark.parametrize("name", in_tiers([name for name in [*QUICK, *LONG] if name != "stablelm"], QUICK))
def test_the_last_layer_computes_what_is_read(name: str) -> None:
    """StableLM keeps padded batches."""
    model = make(name)
    assert batches.use_forests(model.get_base_model(), TREE) is None
    assert fuse(model).layers == 2
    for level in layer.LEVELS:
        for forward in layer.fused_layers(model):
            forward.level = level
        found = read(model, READ)
        # GPT-2 gives its output the shape of its input, whatever its last layer returns.
        assert found["hidden"].shape[1] == (21 if name == "gpt2" else 9)
        if name != "gpt2":
            assert_same(found, read(model, TREE))
    assert layer.fell_back(model) == {}


def test_a_model_that_reads_its_tokens_together_gets_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Olmo2Model.forward

    def centered(self: Olmo2Model, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state - output.last_hidden_state.mean(1, keepdim=True)
        return output

    monkeypatch.setattr(Olmo2Model, "forward", centered)
    model = make("olmo2")
    assert batches.use_forests(model.get_base_model(), TREE) is None
    assert fuse(model).layers == 2
    assert not any(forward.only_read for forward in layer.fused_layers(model))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", in_tiers(HALVES, ("qwen3_next", "lfm2", "gpt_oss", "deepseek_v2")))
def test_half_a_layer_computes_what_its_module_does(name: str, checkpointing: bool) -> None:
    config, layers, parts = HALVES[name]
    given = {"target_modules": _LINEARS, "lora_dropout": 0.2 if name in ("lfm2", "qwen3_5_text") else 0.0}
    expected, model = make(name, config, **given), make(name, config, **given)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    report = fuse(model)
    assert (report.layers, dict(report.parts)) == (layers, parts)
    assert_same(step(model, BATCHES["right padding"]), step(expected, BATCHES["right padding"]))
    assert layer.fell_back(model) == {}
    fast.unfuse(model)
    assert not any("forward" in vars(each) for each in model.modules())


def test_layers_of_a_kind_are_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("smollm3", {"num_hidden_layers": 6, "no_rope_layers": [1, 1, 0, 1, 1, 0]})
    proven = []
    whole = fast.proof._whole
    monkeypatch.setattr(fast.proof, "_whole", lambda call: proven.append(call) or whole(call))
    proofs = Proofs(model.get_base_model())
    forms = [proofs.whole(each).rotary for each in proofs.layers]
    assert forms == ["halves", "halves", None, "halves", "halves", None]
    assert len(proven) == 2


def test_deepseek_v3_is_proven_in_its_own_shape() -> None:
    """Its routers choose groups of experts, of which a small one has few; yarn scales its scores."""
    rotary = {**_YARN, "mscale": 1.0}
    config = DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=1, rope_parameters=rotary)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=_LINEARS))
    proofs = Proofs(model.get_base_model())
    dense, mixture = proofs.layers
    assert proofs.whole(dense).rotary == "neighbours"
    assert proofs.parts(mixture).keys() == {"self_attn", "mlp.shared_experts"}


def test_a_proof_costs_the_same_for_any_size() -> None:
    """A plan's model is on meta: what is compared is small, and of the kinds of layers that the model has."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(Gemma3TextConfig(num_hidden_layers=12), dtype=torch.bfloat16)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=_LINEARS))
    proofs = Proofs(model.get_base_model())
    assert {proofs.whole(each).rotary for each in proofs.layers} == {"halves"}
    assert len({proofs._kinds[each] for each in proofs.layers}) == 2
    small = [call.module for call in proofs._calls.values() if not isinstance(call, str)]
    assert sum(p.numel() for each in small for p in each.parameters()) < 2_000_000
