"""State mixers in padding-free batches: loss and gradients equal those of each sequence alone, and leaks are found."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers.models.lfm2.modeling_lfm2 import Lfm2Model, Lfm2ShortConv
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from halfbyte import QLoRAPlugin
from halfbyte.fast import batches, rows
from halfbyte.fast.forest import ROOT, Forest
from tests import architectures, plain_trl, tiny
from tests.fast import test_batches
from tests.plain_trl import Steps, assert_equal

# Attention in the same layer, in another one, or none.
QUICK: dict[str, dict[str, Any]] = {
    "falcon_h1": {},
    "lfm2": {},
    "mamba2": {},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
}
LONG: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "falcon_mamba": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {},
    "lfm2_vl": {},
    "mamba": {},
    "minimax": {},
    "nemotron_h": {},
    "olmo_hybrid": {},
    "qwen3_5": {},
    "qwen3_5_moe": {},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {},
}
EVERY = [*QUICK, *(pytest.param(name, marks=pytest.mark.faults) for name in LONG)]
# Two pairs, of which one has a side that ends with the prefix, and a row alone.
TREE = Forest.of_lengths([9, 4, 12, 5, 0, 3, 6], [ROOT, 0, 0, ROOT, 3, 3, ROOT])


def make(name: str) -> Any:
    model = architectures.model(name, **(QUICK | LONG)[name]).train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def sees_rows(model: torch.nn.Module) -> bool:
    return any(isinstance(each.__dict__.get("forward"), rows.RowsForward) for each in model.modules())


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    # What is left of large sums (dt_bias) is rounded as these are.
    least = 1e-8 * torch.stack([value.norm() for value in theirs.values()]).norm()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-5 * value.norm() + least, name


@pytest.mark.parametrize("name", EVERY)
def test_loss_and_gradients_equal_padded_batches(name: str) -> None:
    expected, model = make(name), make(name)
    before = model.config._attn_implementation
    loss, gradients = test_batches.step(expected, padding_free=False)
    assert batches.use_forests(model) is None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ours, our_gradients = test_batches.step(model, padding_free=True)
    assert abs(ours - loss) <= 1e-6 * loss
    assert_same(our_gradients, gradients)
    # The same model on padded batches is what it was, and can be made it.
    assert torch.equal(test_batches.step(model, padding_free=False)[0], loss)
    batches.leave(model, before)
    assert not sees_rows(model)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_on_trees_equal_those_of_their_sequences(name: str) -> None:
    expected, model = make(name), make(name)
    assert batches.use_forests(model, batches.PAIR) is None
    ids = torch.randint(4, tiny.VOCABULARY, (1, TREE.ends[-1]), generator=torch.Generator().manual_seed(1))
    given: Any = {"position_ids": TREE.positions(), "attention_mask": TREE.tensor(), "use_cache": False}
    weights = torch.randn(*ids.shape, tiny.VOCABULARY, generator=torch.Generator().manual_seed(2))
    (model(input_ids=ids, **given).logits * weights).sum().backward()
    seen: set[int] = set()
    for leaf in sorted(set(range(len(TREE.ends))) - set(TREE.parents)):
        path = TREE.path(leaf)
        at = torch.cat([torch.arange(*TREE.spans[segment]) for segment in path])
        own = torch.cat([torch.full((len(range(*TREE.spans[i])),), float(i not in seen)) for i in path])
        seen.update(path)
        logits = expected(input_ids=ids[:, at], use_cache=False).logits
        (logits * weights[:, at] * own[None, :, None]).sum().backward()
    assert_same(*(
        {n: p.grad for n, p in each.named_parameters() if p.grad is not None} for each in (model, expected)
    ))  # fmt: skip


def test_tokens_are_in_rows_and_come_back() -> None:
    found = rows.layout(TREE, torch.device("cpu"))
    tokens = torch.arange(TREE.ends[-1])[None]
    (group,) = found.groups
    seen = group.gather(tokens)
    assert seen.shape == (4, 21)
    assert seen[0].tolist() == [*range(13), *[12] * 8]
    assert seen[1].tolist() == [*range(9), *range(13, 25)]
    # The side that ends with its prefix is not there again.
    assert seen[2:4].tolist() == [[*range(25, 33), *[32] * 13], [*range(33, 39), *[38] * 15]]
    assert torch.equal(found.put_back([seen]), tokens)
    x = torch.randn(1, TREE.ends[-1], 3, requires_grad=True)
    group.gather(x).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :9].eq(2).all()


def test_a_long_sequence_beside_short_ones_does_not_pad_these() -> None:
    lengths = [3, 400, *[9] * 20, 5]
    forest = Forest(tuple(accumulate(lengths)), (ROOT,) * len(lengths))
    found = rows.layout(forest, torch.device("cpu"))
    tokens = torch.arange(sum(lengths))[None]
    seen = [group.gather(tokens) for group in found.groups]
    assert [tuple(each.shape) for each in seen] == [(1, 3), (1, 400), (20, 9), (1, 5)]
    assert torch.equal(found.put_back(seen), tokens)


def test_groups_of_rows_compute_what_each_sequence_does() -> None:
    """A batch of which a mixer would see four times the tokens."""
    lengths = [70, *[6] * 12]
    model, expected = make("lfm2"), make("lfm2")
    assert batches.use_forests(model) is None
    ids = torch.randint(4, tiny.VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    weights = torch.randn(*ids.shape, tiny.VOCABULARY, generator=torch.Generator().manual_seed(2))
    (model(input_ids=ids, position_ids=positions, use_cache=False).logits * weights).sum().backward()
    for own, weight in zip(ids.split(lengths, 1), weights.split(lengths, 1), strict=True):
        (expected(input_ids=own, use_cache=False).logits * weight).sum().backward()
    assert_same(*(
        {n: p.grad for n, p in each.named_parameters() if p.grad is not None} for each in (model, expected)
    ))  # fmt: skip


def reads_ahead(self: Any, x: Tensor) -> Tensor:
    return x + x.flip(1)


def reads_other_rows(self: Any, x: Tensor) -> Tensor:
    return x + x.mean(dim=(0, 1), keepdim=True)


@pytest.mark.parametrize("leak", [reads_ahead, reads_other_rows])
@pytest.mark.parametrize("example", [batches.PACKED, batches.PAIR])
def test_a_mixer_that_leaks_is_found_out(monkeypatch: pytest.MonkeyPatch, leak: Any, example: Forest) -> None:
    own = Lfm2ShortConv.forward

    def leaking(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return leak(self, own(self, hidden_states, **kwargs))

    monkeypatch.setattr(Lfm2ShortConv, "forward", leaking)
    model = make("lfm2")
    assert "computes other values on a padding-free batch" in (batches.use_forests(model, example) or "")
    assert model.config._attn_implementation == "sdpa"
    assert not sees_rows(model)


def test_a_model_that_hands_its_layers_no_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Lfm2Model.forward

    def hiding(self: Any, attention_mask: Any = None, cu_seq_lens_q: Any = None, **kwargs: Any) -> Any:
        return own(self, **{name: value for name, value in kwargs.items() if name != rows.BESIDE})

    monkeypatch.setattr(Lfm2Model, "forward", hiding)
    assert "does not pass sequence boundaries to its layers" in (batches.use_forests(make("lfm2")) or "")


def test_tokens_that_a_model_mixes_itself_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Lfm2Model.forward

    def shifting(self: Any, inputs_embeds: Any = None, input_ids: Any = None, **kwargs: Any) -> Any:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return own(self, inputs_embeds=x + x.roll(1, dims=1), **kwargs)

    monkeypatch.setattr(Lfm2Model, "forward", shifting)
    assert "computes other values" in (batches.use_forests(make("lfm2")) or "")


def train(
    base: tuple[str, str], output: Path, cls: type = SFTTrainer, fast: str = "auto", **options: Any
) -> tuple[Steps, Any]:
    sft = cls is SFTTrainer
    given = {"max_steps": 2, "per_device_train_batch_size": 8, "max_length": 64, "router_aux_loss_coef": 0.0}
    args = plain_trl.arguments(SFTConfig if sft else DPOConfig, output, **{**given, **options})
    rows = Dataset.from_list(tiny.texts(8) if sft else tiny.preferences(8))
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=base[1], fast=fast)
    trainer = plugin.trainer(cls, model=base[0], args=args, train_dataset=rows)
    return Steps.of(trainer), trainer.report.fusion


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A base, and an adapter for it that is not trivial."""
    path = architectures.save(tmp_path_factory.mktemp("base"), "qwen3_next", **QUICK["qwen3_next"])
    model = QLoRAPlugin(dtype="float32", lora_r=4).load(path)
    return path, str(plain_trl.save_start(model, tmp_path_factory.mktemp("adapter")))


def test_sft_trains_as_on_padded_rows(base: tuple[str, str], tmp_path: Path) -> None:
    """Also where TRL has packed the rows, which by itself lets states pass from one into the next."""
    theirs, _ = train(base, tmp_path / "none", fast="none")
    for packing in (False, True):
        ours, fusion = train(base, tmp_path / f"{packing}", packing=packing)
        assert fusion.padding_free
        assert_equal(ours, theirs, losses=1e-6)


@pytest.mark.faults
def test_dpo_trains_on_trees_as_on_padded_pairs(base: tuple[str, str], tmp_path: Path) -> None:
    theirs, _ = train(base, tmp_path / "none", DPOTrainer, fast="none")
    ours, fusion = train(base, tmp_path / "auto", DPOTrainer)
    assert fusion.trees
    assert_equal(ours, theirs, losses=1e-6)
