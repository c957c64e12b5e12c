"""Attention on a CPU in both of its forms, against float64 and against PyTorch's own kernel."""

import pytest
import torch
from torch import Tensor

from halfbyte.fast import attention as module
from halfbyte.fast.attention import CpuAttention
from halfbyte.fast.forest import ROOT, Forest

SCALE = 0.11


def draw(batch: int, tokens: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    qkv = torch.randn(batch, tokens, heads + 2 * kv_heads, 32, generator=generator).to(dtype)
    do = torch.randn(batch, tokens, heads, 32, generator=generator).to(dtype)
    return [do, *qkv.split((heads, kv_heads, kv_heads), dim=2)]


def exact(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forest: Forest,
    window: int | None,
    sinks: Tensor | None = None,
) -> list[Tensor]:
    """The output and the gradients of q, k and v in float64, under a mask of the whole row."""
    total = forest.ends[-1]
    seen = torch.zeros(total, total, dtype=torch.bool)
    for segment in forest.segments:
        at = torch.cat([torch.arange(a, b) for a, b in forest.keys(segment)])
        start, end = forest.spans[segment]
        for query in range(start, end):
            mine = at[: len(at) - (end - 1 - query)]
            seen[query, mine[-window:] if window else mine] = True
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    groups = q.shape[2] // k.shape[2]
    query, key, value = (x.transpose(1, 2) for x in inputs)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)], -1)
    o = (scores.softmax(-1)[..., :total] @ value).transpose(1, 2)
    return [o.detach(), *torch.autograd.grad(o, inputs, do.double())]


def computed(call: CpuAttention, do: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    o, kept = call.forward(q, k, v)
    return [o, *call.backward(do, q, k, v, o, kept)]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


FORESTS = {
    "one sequence": Forest.of_lengths([300]),
    "sequences": Forest.of_lengths([70, 290, 1, 129]),
    "a pair": Forest.of_lengths([200, 90, 130], [ROOT, 0, 0]),
    "a group": Forest.of_lengths([33, 250, 20, 65, 1], [ROOT, ROOT, 1, 1, 2]),
}


@pytest.mark.parametrize("longest", [1, 256, 10**6], ids=["products", "both", "kernel"])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("name", FORESTS)
def test_float32_is_exact_to_its_rounding(name, with_sinks, heads, window, longest, monkeypatch) -> None:
    monkeypatch.setattr(module, "_LONG", longest)
    forest = FORESTS[name]
    do, q, k, v = draw(1, forest.ends[-1], *heads, torch.float32)
    sinks = torch.linspace(-2, 6, heads[0]) if with_sinks else None
    found = computed(CpuAttention(SCALE, None, forest, window, None, sinks), do, q, k, v)
    assert max(errors(found, exact(do, q, k, v, forest, window, sinks))) < 1e-6


@pytest.mark.parametrize("longest", [1, 10**6], ids=["products", "kernel"])
@pytest.mark.parametrize("spread", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_pytorch_in_the_same_dtype(
    dtype, spread, longest, monkeypatch
) -> None:
    monkeypatch.setattr(module, "_LONG", longest)
    forest = Forest.of_lengths([150])
    do, q, k, v = draw(1, 150, 4, 2, dtype)
    q = q * spread
    expected = exact(do, q, k, v, forest, None)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    query, key, value = (x.transpose(1, 2) for x in inputs)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=SCALE, enable_gqa=True
    ).transpose(1, 2)
    reference = errors([theirs.detach(), *torch.autograd.grad(theirs, inputs, do)], expected)
    ours = errors(computed(CpuAttention(SCALE, None, forest), do, q, k, v), expected)
    assert all(a <= 1.5 * b for a, b in zip(ours, reference, strict=True)), (ours, reference)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_rows_of_a_batch_do_not_see_each_other(dtype, tolerance, monkeypatch) -> None:
    monkeypatch.setattr(module, "_LONG", 1)
    tensors = draw(3, 100, 4, 2, dtype)
    together = computed(CpuAttention(SCALE, None, None), *tensors)
    for i in range(3):
        alone = computed(CpuAttention(SCALE, None, None), *(x[i : i + 1] for x in tensors))
        for a, b in zip(together, alone, strict=True):
            assert a.dtype == dtype
            assert torch.allclose(a[i : i + 1].float(), b.float(), atol=tolerance)


def test_more_scores_than_fit_the_cache_are_computed_by_heads(monkeypatch) -> None:
    monkeypatch.setattr(module, "_LONG", 1)
    do, q, k, v = draw(1, 200, 6, 3, torch.float32)
    expected = computed(CpuAttention(SCALE, None, None), do, q, k, v)
    monkeypatch.setattr(module.attention_cpu, "_SCORES", 1)
    for a, b in zip(computed(CpuAttention(SCALE, None, None), do, q, k, v), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
