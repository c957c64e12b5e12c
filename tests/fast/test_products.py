"""Attention as products: the numbers of PyTorch's kernel for CPUs, to the rounding of their dtype."""

import pytest
import torch
from torch import Tensor

from halfbyte.fast import products
from halfbyte.fast.attention import CpuAttention, GraphAttention
from halfbyte.fast.forest import ROOT, Forest

# A row; a pair whose answers end inside of a block; a branch that is longer than a block of queries.
FORESTS = {
    "row": Forest.of_lengths([300]),
    "pair": Forest.of_lengths([150, 70, 3], [ROOT, 0, 0]),
    "long branch": Forest.of_lengths([20, 200], [ROOT, 0]),
}


def step(
    forest: Forest,
    heads: tuple[int, int],
    dtype: torch.dtype,
    window: int | None,
    kind: type[CpuAttention | GraphAttention] = CpuAttention,
) -> list[Tensor]:
    """Output and gradients, of values that bfloat16 holds."""
    generator = torch.Generator().manual_seed(7)
    drawn = [
        torch.randn(1, forest.ends[-1], n, 32, generator=generator).bfloat16().to(dtype)
        for n in (heads[0], heads[1], heads[1], heads[0])
    ]
    call = kind(32**-0.5, None, forest, window)
    out, kept = call.forward(*drawn[:3], keep_graph=False)
    return [out, *call.backward(drawn[3], *drawn[:3], out, kept)]


@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_exact_to_the_rounding_of_the_dtype(
    forest: Forest, heads: tuple[int, int], window: int | None, dtype: torch.dtype, monkeypatch
) -> None:
    def by(chosen: bool, dtype: torch.dtype) -> list[Tensor]:
        for name in ("faster_forward", "faster_backward"):
            monkeypatch.setattr(products, name, lambda *_: chosen)
        return step(forest, heads, dtype, window)

    exact = step(forest, heads, torch.float64, window, GraphAttention)
    kernel, ours = by(False, dtype), by(True, dtype)
    for wanted, theirs, found in zip(exact, kernel, ours, strict=True):
        assert found.dtype == theirs.dtype
        error, their_error = ((x.double() - wanted).norm() / wanted.norm() for x in (found, theirs))
        # In bfloat16 scores are rounded before the softmax, by less than gradients are after it.
        assert error <= max(2 * their_error, 2e-7)
        assert error <= (1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
def test_the_kernels_forward_serves_the_backward_by_products(forest: Forest, monkeypatch) -> None:
    """Each is chosen by itself."""
    monkeypatch.setattr(products, "faster_forward", lambda *_: False)
    monkeypatch.setattr(products, "faster_backward", lambda *_: False)
    kernel = step(forest, (4, 2), torch.float32, None)
    monkeypatch.setattr(products, "faster_backward", lambda *_: True)
    mixed = step(forest, (4, 2), torch.float32, None)
    for theirs, ours in zip(kernel, mixed, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
