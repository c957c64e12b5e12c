"""Attention sinks: the numbers of the models' own attention, on padding-free batches and trees too."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin
from halfbyte.fast import attention_graph, batches
from halfbyte.fast.attention import CpuAttention
from halfbyte.fast.attention_graph import GraphAttention
from halfbyte.fast.forest import ROOT, Forest
from tests import architecture_table, architectures, plain_trl, tiny
from tests.fast import test_families as families
from tests.plain_trl import Steps

SINKS = torch.linspace(-2, 5, 6)
SCALE = 0.3
PAIR = Forest.of_lengths([40, 17, 9, 33], [ROOT, 0, 0, ROOT])


def draw(rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries of six heads, keys and values of two, and a gradient of the output."""
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(rows, tokens, heads, 16, generator=generator) for heads in (6, 2, 2, 6)]
    return [x.to(dtype).requires_grad_() for x in drawn[:3]] + [drawn[3].to(dtype)]


@pytest.mark.parametrize("kind", [CpuAttention, GraphAttention])
@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
def test_under_a_mask_it_is_the_eager_attention(kind: Any, added: bool) -> None:
    """Left padding: the padded queries see nothing."""
    q, k, v, do = draw(2, 12)
    seen = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12).clone()
    seen[0, :, :, :5] = False
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    module: Any = SimpleNamespace(num_key_value_groups=3, sinks=SINKS, training=True)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected, _ = eager_attention_forward(module, *heads, mask, SCALE)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :5] = False
    given = mask if added or kind is CpuAttention else seen
    if kind is CpuAttention and not added:
        given = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    found = kind(SCALE, given, None, None, None, SINKS).attend(q, k, v)
    assert torch.allclose(found[real], expected[real], atol=1e-6)
    do[~real] = 0
    theirs = torch.autograd.grad(expected, (q, k, v), do)
    for ours, reference in zip(torch.autograd.grad(found, (q, k, v), do), theirs, strict=True):
        assert (ours - reference).norm() <= 1e-5 * reference.norm()


def weights(q: Tensor, k: Tensor, scale: float, window: int) -> Tensor:
    """Scores ``[N, queries, keys]`` in float64, -inf where the kernel would not look."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qnd,knd->nqk", q.double(), k.double()) * scale
    keys = torch.arange(len(k))
    behind = torch.arange(len(k) - len(q), len(k))[:, None] - keys
    hidden = (behind < 0) if window < 0 else (behind < 0) | (behind > window)
    return scores.masked_fill(hidden, float("-inf"))


def kernel(q, k, v, at_q, at_k, longest_q, longest_k, *, return_aux, scale, window_size, enable_gqa):
    """What ``varlen_attn`` returns, by its documentation."""
    assert return_aux.lse
    out, sums = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for (a, b), (c, d) in zip(at_q.unfold(0, 2, 1).tolist(), at_k.unfold(0, 2, 1).tolist(), strict=True):
        scores = weights(q[a:b], k[c:d], scale, window_size[0])
        value = v[c:d].double().repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[a:b] = torch.einsum("nqk,knd->qnd", scores.softmax(-1), value).to(q.dtype)
        sums[:, a:b] = scores.logsumexp(-1)
    return out, sums


def kernel_backward(do, q, k, v, out, sums, at_q, at_k, *_, scale, window_size_left, window_size_right):
    """The gradients as flash attention computes them: weights from the log-sums it is given."""
    assert window_size_right == 0
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(at_q.unfold(0, 2, 1).tolist(), at_k.unfold(0, 2, 1).tolist(), strict=True):
        share = (weights(q[a:b], k[c:d], scale, window_size_left) - sums[:, a:b, None].double()).exp()
        key, value = (x[c:d].double().repeat_interleave(groups, 1) for x in (k, v))
        along = (do[a:b].double() * out[a:b].double()).sum(-1).t()[..., None]
        dscores = share * (torch.einsum("qnd,knd->nqk", do[a:b].double(), value) - along) * scale
        dq[a:b] = torch.einsum("nqk,knd->qnd", dscores, key)
        of_keys = torch.einsum("nqk,qnd->knd", dscores, q[a:b].double())
        of_values = torch.einsum("nqk,qnd->knd", share, do[a:b].double())
        for total, part in ((dk, of_keys), (dv, of_values)):
            total[c:d] += part.unflatten(1, (-1, groups)).sum(2)
    return tuple(x.to(q.dtype) for x in (dq, dk, dv))


@pytest.mark.parametrize("window", [None, 12])
def test_the_kernel_of_a_gpu_gets_the_sinks_in_its_log_sums(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the kernel, with its documented semantics: no GPU is needed."""
    q, k, v, do = draw(1, PAIR.ends[-1], torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = CpuAttention(SCALE, None, PAIR, window, None, SINKS).attend(*exact)
    monkeypatch.setattr(attention_graph, "has_varlen", lambda device: True)
    monkeypatch.setattr(attention_graph, "varlen_attn", kernel)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", kernel_backward)
    call = GraphAttention(SCALE, None, PAIR, window, None, SINKS)
    found, kept = call.forward(q, k, v, keep_graph=True)
    assert kept is not None
    gradients = call.backward(do, q, k, v, found, kept)
    references = [expected, *torch.autograd.grad(expected, exact, do.float())]
    for ours, reference in zip([found, *gradients], references, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - reference).norm() <= 5e-3 * reference.norm()


@pytest.mark.parametrize("name", ["gpt_oss", "granite_swa"])
def test_sinks_that_are_trained_are_left_to_the_model(name: str) -> None:
    model = families.make(name)
    base = model.get_base_model()
    for key, parameter in base.named_parameters():
        if key.endswith(".sinks"):
            parameter.requires_grad_()
    assert batches.use_forests(base) == "attention sinks are trained"
    assert base.config._attn_implementation == "eager"
    report = families.fuse(model)
    assert (report.layers, dict(report.parts).get("attention", 0)) == (0, 0)
    assert "attention sinks are trained" in report.layers_apart or name == "gpt_oss"
    families.step(model, families.BATCHES["packed"])
    assert all(p.grad.any() for key, p in base.named_parameters() if key.endswith(".sinks"))


@pytest.mark.parametrize(
    ("trainer", "config", "rows"),
    [(SFTTrainer, SFTConfig, tiny.texts), (DPOTrainer, DPOConfig, tiny.preferences)],
    ids=["sft", "dpo"],
)
def test_a_run_has_the_numbers_of_plain_trl(trainer: Any, config: Any, rows: Any, tmp_path: Path) -> None:
    """Windows are shorter than the rows."""
    base, start = architectures.save(tmp_path / "base", "gpt_oss", sliding_window=8), tmp_path / "start"
    plain_trl.save_start(QLoRAPlugin(dtype="float32", lora_r=4).load(base), start)
    data = Dataset.from_list(rows(12))
    args = {name: plain_trl.arguments(config, tmp_path / name, max_steps=3) for name in ("ours", "theirs")}
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(start))
    ours = plugin.trainer(trainer, model=base, args=args["ours"], train_dataset=data)
    fusion = ours.report.fusion
    assert (dict(fusion.parts), fusion.batches, fusion.trees) == (
        {"attention": 2},
        "on",
        trainer is DPOTrainer,
    )
    theirs = trainer(
        model=PeftModel.from_pretrained(architecture_table.rounded(base), start, is_trainable=True),
        args=args["theirs"],
        train_dataset=data,
        processing_class=tiny.tokenizer(),
    )
    plain_trl.assert_equal(Steps.of(ours), Steps.of(theirs))
