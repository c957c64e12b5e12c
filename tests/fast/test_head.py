"""The tiled head equals TRL's fused head: outputs, gradients, ties, masks, soft caps and empty batches."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from halfbyte.fast import head, scores
from tests import architectures, tiny

OUTPUTS = ("log_probs", "entropy", "is_top1")


def models(build, ours: bool):
    torch.manual_seed(0)
    model = build()
    model.lm_head.weight.requires_grad_(False)
    add_fused_lm_head(model, outputs=OUTPUTS)
    if ours:
        assert head.install(model) is None
    return model


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(tiny.CONFIGS["llama"]())


def gemma2() -> Gemma2ForCausalLM:
    shape = {**tiny._GATED, "tie_word_embeddings": False}
    config = Gemma2Config(**shape, head_dim=16, final_logit_softcapping=0.5, attn_logit_softcapping=None)
    return Gemma2ForCausalLM(config)


def run(model, ids, labels, weights=None, **options):
    model.zero_grad()
    out = model(input_ids=ids, labels=labels, fused_lm_head=True, **options)
    loss = (out.log_probs * (1 if weights is None else weights)).sum() / 7
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out, grads


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, tiny.VOCABULARY, (3, 21), generator=generator)
    labels = ids.clone()
    labels[0, :9] = -100
    labels[2, 15:] = -100
    return ids, labels


def scaled(name: str, **more):
    """A model that multiplies or divides its logits, or bounds them under another name."""
    return lambda: architectures.model(name, tie_word_embeddings=False, **more)


@pytest.mark.parametrize(
    "build",
    [
        llama,
        gemma2,
        scaled("cohere2", logit_scale=0.3),
        scaled("granite", logits_scaling=3.0),
        scaled("minicpm3", hidden_size=64, dim_model_base=16),
    ],
    ids=["llama", "gemma2", "cohere2", "granite", "minicpm3"],
)
@pytest.mark.parametrize("masked", [True, False])
def test_equals_trls_head_for_any_weights(batch, build, masked: bool, monkeypatch) -> None:
    monkeypatch.setattr(scores, "chunk_rows", lambda vocabulary, device: 8)
    ids, labels = batch
    labels = labels if masked else ids
    weights = torch.linspace(-1, 2, 20)
    (ours, our_grads), (theirs, their_grads) = (
        run(models(build, x), ids, labels, weights) for x in (True, False)
    )
    for name in ("log_probs", "entropy", "loss"):
        assert torch.allclose(ours[name], theirs[name], atol=2e-5, rtol=1e-5), name
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert our_grads.keys() == their_grads.keys()
    for name, gradient in our_grads.items():
        assert (gradient - their_grads[name]).norm() <= 1e-5 * their_grads[name].norm(), name
        assert gradient.norm() > 0


def test_num_items_divides_the_loss(batch) -> None:
    ids, labels = batch
    out, _ = run(models(llama, True), ids, labels, num_items_in_batch=torch.tensor(11))
    assert torch.allclose(out.loss, -out.log_probs.sum() / 11)


def test_a_batch_without_labels_gives_a_differentiable_zero(batch) -> None:
    ids, _ = batch
    out, grads = run(models(llama, True), ids, torch.full_like(ids, -100))
    assert out.loss == 0
    assert not out.label_mask.any()
    assert all(gradient.norm() == 0 for gradient in grads.values())


def test_without_gradients_nothing_is_kept(batch) -> None:
    ids, labels = batch
    model = models(llama, True)
    with torch.no_grad():
        silent = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert not silent.log_probs.requires_grad
    assert torch.allclose(silent.log_probs, run(model, ids, labels)[0].log_probs)


def test_without_the_fused_head_the_forward_is_the_models_own(batch) -> None:
    ids, labels = batch
    model = models(llama, True)
    out = model(input_ids=ids, labels=labels)
    assert out.logits.shape == (3, 21, tiny.VOCABULARY)
    assert torch.allclose(out.loss, run(model, ids, labels)[0].loss, atol=1e-5)


def test_a_tie_belongs_to_the_first_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [0.0, 3.0, 3.0]])
    told, _ = scores.score(logits, torch.tensor([1, 2]), None, False)
    assert told["is_top1"].tolist() == [True, False]


def test_the_likeliest_token_is_found_where_logits_nearly_tie() -> None:
    logits = torch.zeros(1, 131_072)
    logits[0, 500] = 0.01
    logits[0, 3] = torch.nextafter(logits[0, 500], torch.tensor(0.0))
    told, _ = scores.score(logits, torch.tensor([500]), None, False)
    assert told["is_top1"].tolist() == [True]


def test_a_large_vocabulary_costs_no_precision() -> None:
    logits = 4 * torch.randn(16, 131_072, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(16)
    exact = logits.double().log_softmax(1)
    told, gradient = scores.score(logits, targets, None, True)
    assert (told["log_probs"] - exact[targets, targets]).abs().max() < 5e-6
    assert (told["entropy"] + (exact.exp() * exact).sum(1)).abs().max() < 5e-6
    exact = exact.exp() - torch.nn.functional.one_hot(targets, 131_072)
    assert (gradient - exact).norm() < 2e-7 * exact.norm()


@pytest.mark.parametrize("vocabulary", [8_000, 32_000, 128_256, 262_144])
def test_chunks_stay_small(vocabulary: int) -> None:
    assert 64 <= scores.chunk_rows(vocabulary, "cpu") <= 256
    assert scores.chunk_rows(vocabulary, "cuda") * vocabulary * 4 <= 2**30


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.lm_head.weight.requires_grad_(True), "is trained"),
        (lambda m: m.set_output_embeddings(nn.Sequential(m.lm_head)), "Sequential"),
    ],
)
def test_what_is_not_covered_is_left_to_trl(change, reason: str) -> None:
    model = models(llama, False)
    before = model.forward
    change(model)
    assert reason in (head.install(model) or "")
    assert model.forward == before


def test_bfloat16_gradients_are_as_good_as_trls(batch) -> None:
    ids, labels = batch
    _, exact = run(models(llama, False), ids, labels)

    def error(ours: bool) -> float:
        _, grads = run(models(llama, ours).bfloat16(), ids, labels)
        return sum(((grads[n].float() - exact[n]).norm() / exact[n].norm()).item() for n in exact)

    assert error(True) <= 1.1 * error(False)


def test_a_soft_cap_by_another_name(batch) -> None:
    """TRL's head, which does not know the name, reads it while a trainer is built."""
    ids, labels = batch
    build = scaled("recurrent_gemma", logits_soft_cap=0.5, num_hidden_layers=3)
    torch.manual_seed(0)
    model = build()
    model.lm_head.weight.requires_grad_(False)
    with head.cap_for_trl(model):
        add_fused_lm_head(model, outputs=OUTPUTS)
    assert not hasattr(model.config, "final_logit_softcapping")
    theirs, their_grads = run(model, ids, labels)
    logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)[theirs.label_mask]
    assert torch.allclose(theirs.log_probs[theirs.label_mask], expected, atol=1e-5)
    assert head.install(model) is None
    ours, our_grads = run(model, ids, labels)
    assert torch.allclose(ours.log_probs, theirs.log_probs, atol=1e-5)
    for name, gradient in our_grads.items():
        assert (gradient - their_grads[name]).norm() <= 1e-5 * their_grads[name].norm(), name
