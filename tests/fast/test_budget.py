"""The memory budget: what each level keeps is what is estimated, and the fastest level that fits is taken."""

import pytest
import torch

from halfbyte.errors import UserError
from halfbyte.fast import budget, layer
from tests.fast import models, test_layer

TOKENS = test_layer.BATCHES["causal"]["input_ids"].numel()


@pytest.mark.parametrize("level", layer.LEVELS)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_level_keeps_is_what_is_estimated(arch: str, level: int, dtype: torch.dtype) -> None:
    model = test_layer.fuse_all(models.make(arch, dtype), level)
    (forward, _) = (each.forward for each in models.layers(model))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    hidden = torch.randn(2, 19, models.SHAPE["hidden_size"]).to(dtype)
    positions = model.get_base_model().model.rotary_emb(hidden, torch.arange(19)[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(hidden, position_embeddings=positions)
    estimate = 2 * 19 * budget.kept_per_token(forward.decoder, level, dtype.itemsize)
    assert sum(kept.values()) == estimate


def test_the_fastest_level_that_fits() -> None:
    model = test_layer.fuse_all(models.make("llama"))
    decoders = [each.forward.decoder for each in models.layers(model)]
    needs = list(budget.needed(model, decoders, 10**6).values())
    assert needs[1:] == sorted(set(needs[1:]))  # level 0 holds one layer's again, which here is all there is
    assert budget.apply(model, "1MB", 10**6).level == 0
    for level, need in enumerate(needs[1:], start=1):
        choice = budget.apply(model, f"{need / 10**6 + 1}MB", 10**6)
        assert choice is not None
        assert choice.level == level
        assert choice.needed == need
        assert [each.forward.level for each in models.layers(model)] == [level, level]


def test_min_keeps_nothing_and_auto_uses_a_free_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = test_layer.fuse_all(models.make("llama"))
    assert budget.apply(model, "min", TOKENS).level == 0
    assert budget.apply(model, "auto", TOKENS).level == 3
    decoders = [each.forward.decoder for each in models.layers(model)]
    twice = 2 * budget.needed(model, decoders, TOKENS)[3]
    monkeypatch.setattr(budget, "_host_memory", lambda: twice)
    assert budget.apply(model, "auto", TOKENS).level == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert budget.apply(model, "auto", TOKENS).level < 3


def test_rank_0_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = test_layer.fuse_all(models.make("llama"))
    monkeypatch.setattr(budget.distributed, "agree", lambda mine: 1)
    assert budget.apply(model, "min", TOKENS).level == 1
    assert models.layers(model)[1].forward.level == 1


def test_a_recorded_level_is_kept() -> None:
    model = test_layer.fuse_all(models.make("llama"))
    choice = budget.apply(model, "auto", TOKENS, recorded=1)
    assert choice is not None
    assert (choice.level, choice.recorded) == (1, True)
    assert [each.forward.level for each in models.layers(model)] == [1, 1]


def test_a_model_without_fused_layers() -> None:
    assert budget.apply(models.make("llama"), "auto", TOKENS) is None


def test_levels_change_no_number() -> None:
    """So a resumed run may keep more or less than the run it continues."""
    found = []
    for level in layer.LEVELS:
        model = test_layer.fuse_all(models.make("qwen3", lora_dropout=0.2), level)
        found.append(test_layer.step(model, test_layer.BATCHES["causal"]))
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])


@pytest.mark.parametrize("text", ["lots", "12", "-3GB", "8 gigs", "", "12KB"])
def test_a_budget_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match="memory_budget"):
        budget.check(text)


@pytest.mark.parametrize("text", ["auto", "min", "12GiB", "1.5 TB", "800MB"])
def test_budgets(text: str) -> None:
    budget.check(text)
