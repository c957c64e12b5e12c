"""The memory budget: what each level keeps is what is estimated, and the fastest level that fits is taken."""

import pytest
import torch

from halfbyte import memory
from halfbyte.errors import UserError
from halfbyte.fast import layer
from halfbyte.fast.forest import ROOT, Forest
from halfbyte.memory import Workload, available, level, step
from halfbyte.memory import model as memory_model
from tests.fast import models, test_families, test_layer

TOKENS = test_layer.BATCHES["causal"]["input_ids"].numel()
LARGE = Workload(tokens=10**6, longest=10**3, optim="adamw_torch")
SMALL = Workload(tokens=TOKENS, longest=TOKENS, optim="adamw_torch")


@pytest.mark.parametrize("at", layer.LEVELS)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_level_keeps_is_what_is_estimated(arch: str, at: int, dtype: torch.dtype) -> None:
    model = test_layer.fuse_all(models.make(arch, dtype), at)
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
    estimate = 2 * 19 * step.kept_per_token(forward.parts, at, dtype.itemsize)
    assert sum(kept.values()) == estimate


@pytest.mark.parametrize("at", layer.LEVELS)
def test_what_the_last_layer_keeps_is_what_is_estimated(at: int) -> None:
    """Of a row of 19 tokens of which 6 are read."""
    model = test_layer.fuse_all(models.make("qwen2"), at)
    forward = models.layers(model)[-1].forward
    forward.only_read = True
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    hidden = torch.randn(1, 19, models.SHAPE["hidden_size"])
    positions = model.get_base_model().model.rotary_emb(hidden, torch.arange(19)[None])
    tree = Forest((12, 15, 19), (ROOT, 0, 0), read_from=(11, 12, 17)).tensor()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert forward(hidden, position_embeddings=positions, attention_mask=tree).shape[1] == 6
    each, of_all = (of(forward.parts, at, 4) for of in (step.kept_per_token, step.kept_of_all))
    assert sum(kept.values()) == 19 * of_all + 6 * (each - of_all)


@pytest.mark.parametrize("name", ["cohere2", "nemotron", "olmo2", "qwen3_5_text", "minicpm3"])
def test_what_a_described_layer_keeps_is_what_is_estimated(name: str) -> None:
    """Norms that close a half, halves side by side, a plain MLP, gates of the output, and latents."""
    model = test_families.make(name, test_families.HALVES[name][0] if name in test_families.HALVES else None)
    test_families.fuse(model)
    (forward, *_) = layer.fused_layers(model)
    given: dict[str, object] = {}
    forward.module.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(kwargs, x=args[0]), with_kwargs=True
    )
    model(torch.arange(38).view(2, 19), use_cache=False)
    hidden = given.pop("x").detach()
    for forward.level in layer.LEVELS:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(hidden, **given)
        assert forward.reason is None
        assert sum(kept.values()) == 2 * 19 * step.kept_per_token(forward.parts, forward.level, 4)


def test_the_fastest_level_that_fits() -> None:
    model = test_layer.fuse_all(models.make("llama"))
    needs = [each.total - each.loaded for each in memory_model.by_level(model, LARGE).values()]
    assert needs[1:] == sorted(set(needs[1:]))  # level 0 holds one layer's again, which here is all there is
    assert memory.choose(model, "1MB", LARGE).level == 0
    for at, need in enumerate(needs[1:], start=1):
        choice = memory.choose(model, f"{need / 10**6 + 1}MB", LARGE)
        assert choice is not None
        assert choice.level == at
        assert choice.needed == need
        assert [each.forward.level for each in models.layers(model)] == [at, at]


def test_min_keeps_nothing_and_auto_uses_a_free_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = test_layer.fuse_all(models.make("llama"))
    assert memory.choose(model, "min", SMALL).level == 0
    assert memory.choose(model, "auto", SMALL).level == 3
    found = memory_model.by_level(model, SMALL)[3]
    twice = 2 * (found.total - found.loaded) + 2
    monkeypatch.setattr(available, "host_memory", lambda: twice)
    assert memory.choose(model, "auto", SMALL).level == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.choose(model, "auto", SMALL).level < 3


def test_rank_0_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = test_layer.fuse_all(models.make("llama"))
    monkeypatch.setattr(level.distributed, "agree", lambda mine: 1)
    assert memory.choose(model, "min", SMALL).level == 1
    assert models.layers(model)[1].forward.level == 1


def test_a_recorded_level_is_kept() -> None:
    model = test_layer.fuse_all(models.make("llama"))
    choice = memory.choose(model, "auto", SMALL, recorded=1)
    assert choice is not None
    assert (choice.level, choice.recorded) == (1, True)
    assert [each.forward.level for each in models.layers(model)] == [1, 1]


def test_a_model_without_fused_layers() -> None:
    assert memory.choose(models.make("llama"), "auto", SMALL) is None


def test_levels_change_no_number() -> None:
    """So a resumed run may keep more or less than the run it continues."""
    found = []
    for at in layer.LEVELS:
        model = test_layer.fuse_all(models.make("qwen3", lora_dropout=0.2), at)
        found.append(test_layer.step(model, test_layer.BATCHES["causal"]))
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])


@pytest.mark.parametrize("text", ["lots", "12", "-3GB", "8 gigs", ""])
def test_a_budget_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match="memory_budget"):
        memory.check_budget(text)


@pytest.mark.parametrize("text", ["auto", "min", "12GiB", "1.5 TB", "800MB"])
def test_budgets(text: str) -> None:
    memory.check_budget(text)
