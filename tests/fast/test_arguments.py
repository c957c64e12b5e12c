"""No argument of a decoder layer is dropped: one that fused layers do not know goes to the layer's own forward."""

import importlib
import inspect

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from halfbyte.fast import arguments, layer
from tests.fast import models
from tests.fast.test_layer import fuse_all

IDS = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(3))
# Upstream's cache argument: `past_key_values` in transformers 5.23, `cache` from 5.24.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
GENERATION = [("llama", {}), ("llama", {"num_beams": 2}), ("mistral", {}), ("qwen2", {}), ("qwen3", {})]


def inputs(model: PeftModel) -> tuple[Tensor, dict[str, object]]:
    """A call of a decoder layer, as its model makes it."""
    hidden = torch.randn(2, 7, models.SHAPE["hidden_size"], generator=torch.Generator().manual_seed(1))
    positions = torch.arange(7)[None]
    rotary = model.get_base_model().model.rotary_emb(hidden, positions)
    return hidden, {"attention_mask": None, "position_ids": positions, "position_embeddings": rotary}


@pytest.fixture
def model() -> PeftModel:
    return fuse_all(models.make("llama"))


@pytest.fixture
def given(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the original forward of Llama's layers, fused already, received last."""
    found: dict[str, object] = {}

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        found.clear()
        found.update(kwargs, args=args)
        return hidden_states

    module = importlib.import_module("transformers.models.llama.modeling_llama")
    monkeypatch.setattr(module.LlamaDecoderLayer, "forward", forward)
    return found


UNKNOWN = {
    "past_key_values": (DynamicCache(), "a KV cache"),
    "cache": (DynamicCache(), "a KV cache"),
    "output_attentions": (True, "attention weights are requested"),
    "is_causal": (False, "the argument 'is_causal', which fused layers do not know"),
    "position_bias": (torch.zeros(1), "the argument 'position_bias', which fused layers do not know"),
    "cache_params": (object(), "the argument 'cache_params', which fused layers do not know"),
    "layer_past": ((), "the argument 'layer_past', which fused layers do not know"),
    "head_mask": (torch.ones(1), "the argument 'head_mask', which fused layers do not know"),
    "softcap": (30.0, "the argument 'softcap', which fused layers do not know"),
    "invented_later": (0, "the argument 'invented_later', which fused layers do not know"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_argument_falls_back(name: str, model: PeftModel, given: dict[str, object]) -> None:
    each = models.layers(model)[0]
    value, reason = UNKNOWN[name]
    hidden, known = inputs(model)
    each(hidden, **known, **{name: value})
    assert given[name] is value
    assert all(given[key] is known[key] for key in known)
    assert each.forward.reason == reason
    assert layer.fell_back(model) == {reason: 1}
    with torch.no_grad():  # evaluation and generation are not counted
        each(hidden, **known, **{name: value})
    assert layer.fell_back(model) == {reason: 1}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_argument_that_is_none_does_not(
    name: str, model: PeftModel, given: dict[str, object]
) -> None:
    hidden, known = inputs(model)
    models.layers(model)[0](hidden, **known, **{name: None})
    assert not given
    assert layer.fell_back(model) == {}


def test_arguments_by_position_fall_back(model: PeftModel, given: dict[str, object]) -> None:
    hidden, known = inputs(model)
    models.layers(model)[0](hidden, None, **{key: known[key] for key in list(known)[1:]})
    assert given["args"] == (None,)
    assert layer.fell_back(model) == {"arguments given by position": 1}


WITHOUT_EFFECT = {
    "cu_seq_lens_k": torch.tensor([0, 7], dtype=torch.int32),
    "max_length_k": 7,
    "max_length_q": 7,
    "num_items_in_batch": torch.tensor(3),
    "output_hidden_states": True,
    "output_router_logits": True,
    "seq_idx": torch.zeros(2, 7, dtype=torch.int32),
    "shared_kv_states": {},
    "shift_labels": IDS,
    "use_cache": True,
}


def test_every_argument_without_effect_is_tried() -> None:
    assert WITHOUT_EFFECT.keys() == arguments.WITHOUT_EFFECT


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_an_argument_without_effect_has_none_upstream(name: str) -> None:
    """So that dropping it is right: the layer's own forward computes the same with it and without."""
    model = models.make("llama")
    each = models.layers(model)[0]
    hidden, known = inputs(model)
    assert torch.equal(each(hidden, **known), each(hidden, **known, **{name: WITHOUT_EFFECT[name]}))


@pytest.mark.parametrize("arch", ["gemma", "llama", "mistral", "qwen2", "qwen3"])
def test_every_argument_upstream_names_is_known(arch: str) -> None:
    """An upgrade that renames or adds an argument fails here by name."""
    module = importlib.import_module(f"transformers.models.{arch}.modeling_{arch}")
    (cls,) = (each for name, each in vars(module).items() if name.endswith("DecoderLayer"))
    named = set(inspect.signature(cls.forward).parameters) - {"self", "hidden_states", "kwargs"}
    assert named == {"attention_mask", "position_ids", "position_embeddings", "use_cache", CACHE}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("arch", "options"), GENERATION, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_generation_equals_the_unfused_models(
    arch: str, options: dict, use_cache: bool, training: bool
) -> None:
    """Greedy and beam search, in evaluation and in training mode with checkpointing, as `sample_prompts` runs it."""
    found = []
    for fused in (False, True):
        model = models.make(arch)
        if fused:
            fuse_all(model)
        model.train(training)
        if training:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # Left padding, as in a batch of prompts.
        mask = torch.ones_like(IDS)
        mask[0, :3] = 0
        arguments = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, **options}
        found.append(model.generate(input_ids=IDS, attention_mask=mask, **arguments))
    assert found[0].shape[1] > IDS.shape[1] + 1
    assert torch.equal(*found)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_cache_is_filled_and_read(arch: str) -> None:
    plain, fused = models.make(arch).eval(), fuse_all(models.make(arch).eval())
    caches = DynamicCache(), DynamicCache()
    for part in (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:]):
        outputs = [
            model(input_ids=part, use_cache=True, **{CACHE: cache}).logits
            for model, cache in zip((plain, fused), caches, strict=True)
        ]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert caches[1].get_seq_length() == IDS.shape[1]


def test_hidden_states_are_returned() -> None:
    plain, fused = models.make("llama").eval(), fuse_all(models.make("llama").eval())
    theirs, ours = (
        model(input_ids=IDS, use_cache=False, output_hidden_states=True) for model in (plain, fused)
    )
    assert len(ours.hidden_states) == 3
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
