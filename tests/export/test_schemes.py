"""Quantization schemes against formulas, a second implementation, and each other on Gaussian weights."""

from statistics import NormalDist

import pytest
import torch

from halfbyte.export import schemes
from halfbyte.export.schemes import BLOCKS, COMPARED, SIZES, Scheme

SHAPES = [(64, 128), (96, 64), (256, 512)]


def gaussian(shape: tuple[int, int] = (256, 512)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def error(scheme: Scheme, weight: torch.Tensor) -> float:
    return ((scheme.apply(weight)[0] - weight).norm() / weight.norm()).item()


def nearest(weight: torch.Tensor, block: int, code: torch.Tensor) -> torch.Tensor:
    """Each weight as the nearest level of its block's scale."""
    blocks = weight.reshape(-1, block)
    scale = blocks.abs().amax(1, keepdim=True)
    return (code[((blocks / scale)[..., None] - code).abs().argmin(-1)] * scale).view(weight.shape)


@pytest.mark.parametrize("scheme", [*COMPARED, *SIZES], ids=lambda scheme: scheme.name)
def test_bits_by_formula_are_those_of_the_bytes(scheme: Scheme) -> None:
    weight = gaussian((256, 4096))
    found, size = scheme.apply(weight)
    assert found.shape == weight.shape
    assert found.dtype == torch.float32
    assert 8 * size / weight.numel() == pytest.approx(scheme.bits, abs=2e-3)


def test_published_bits() -> None:
    """arXiv 2305.14314: 0.5 bits a parameter for the scales, and 0.127 with double quantization."""
    assert schemes.four_bits("nf4").bits == 4.5
    assert schemes.NF4.bits == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_nf4_takes_the_nearest_level(shape: tuple[int, int], block: int) -> None:
    """Also where a block is longer than a row, which bitsandbytes dequantizes wrongly on CPUs."""
    weight = gaussian(shape)
    if weight.numel() % block:
        pytest.skip("no whole blocks")
    scheme = schemes.four_bits("nf4", block=block)
    assert torch.allclose(scheme.apply(weight)[0], nearest(weight, block, schemes.levels()), atol=1e-6)


def test_the_levels_are_the_paper_s() -> None:
    """Quantiles of a normal distribution, half a step within 0 and 1 and with a zero, scaled to [-1, 1]."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(share) for share in torch.linspace(offset, 0.5, 9)[:-1].tolist()]
    negative = [-quantile(share) for share in torch.linspace(offset, 0.5, 8)[:-1].tolist()]
    wanted = torch.tensor(sorted([*negative, 0.0, *positive])) / max(positive)
    assert torch.allclose(schemes.levels(), wanted.float(), atol=2e-4)


def test_uniform_levels() -> None:
    weight = torch.tensor([[7.0, -3.2, 0.4, 0.0] * 16])
    found, size = schemes.uniform(4).apply(weight)
    assert found[0, :4].tolist() == [7.0, -3.0, 0.0, 0.0]
    assert size == 32 + 4
    assert torch.equal(schemes.uniform(8).apply(torch.zeros(2, 64))[0], torch.zeros(2, 64))


def test_kmeans_finds_clusters() -> None:
    centers = torch.linspace(-1, 1, 16)
    weight = centers[torch.randint(16, (128, 128), generator=torch.Generator().manual_seed(0))]
    assert torch.allclose(schemes.clustered().apply(weight)[0], weight, atol=1e-6)


def test_pruning_keeps_the_largest() -> None:
    weight = gaussian()
    found = schemes.pruned(0.5, schemes.uniform(8)).apply(weight)[0]
    assert (found == 0).float().mean() >= 0.5
    kept = weight.abs() > weight.abs().median()
    assert torch.allclose(found[kept], weight[kept], atol=0.05)


def test_the_order_on_gaussian_weights() -> None:
    by_name = {scheme.name: error(scheme, gaussian()) for scheme in COMPARED}
    int8, int4, fp4, nf4, double, clusters, half = by_name.values()
    assert int8 < nf4 <= double < clusters < min(int4, fp4) < half
    # The best 16 levels for a normal distribution (Max, 1960): a squared error of 0.0095.
    assert clusters == pytest.approx(0.0095**0.5, rel=0.01)
    assert double == pytest.approx(nf4, rel=0.01)
    sizes = [error(scheme, gaussian()) for scheme in (*SIZES[:1], schemes.four_bits("nf4"), *SIZES[1:])]
    assert sizes == sorted(sizes)


def test_drift_grows_with_every_round() -> None:
    found = schemes.drift(gaussian(), (1, 10, 30))
    assert 0.005 < found[1] < 0.05
    assert found[1] < found[10] < found[30]
