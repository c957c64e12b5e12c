"""Quantization schemes side by side: what each makes of a weight, and how many bits it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

BLOCK = 64
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_SAMPLE = 1 << 20  # weights that k-means looks at in each round
_ROUNDS = 200


@dataclass(frozen=True)
class Scheme:
    """A scheme by its ``name``; ``bits`` a parameter by formula, and ``apply`` to a float32 weight.

    ``apply`` returns the weight as it would be computed with, and the bytes that it is stored in.
    """

    name: str
    bits: float
    apply: Callable[[Tensor], tuple[Tensor, int]]


def uniform(bits: int, block: int = BLOCK) -> Scheme:
    """Integers, evenly spaced within the largest magnitude of each block; scales in 32 bits."""
    top = 2 ** (bits - 1) - 1

    def apply(weight: Tensor) -> tuple[Tensor, int]:
        blocks = _blocks(weight, block)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / top
        found = (blocks / scale).round_().mul_(scale)
        return _like(found, weight), weight.numel() * bits // 8 + 4 * len(blocks)

    return Scheme(f"int{bits} absmax", bits + 32 / block, apply)


def four_bits(kind: str, *, block: int = BLOCK, double: bool = False) -> Scheme:
    """bitsandbytes' FP4 or NF4 (arXiv 2305.14314), with the scales in 32 bits or quantized to 8 themselves."""

    def apply(weight: Tensor) -> tuple[Tensor, int]:
        # As one row: on CPUs bitsandbytes 0.50 dequantizes blocks that are longer than a row wrongly.
        row = weight.reshape(1, -1)
        packed, state = bnb.quantize_4bit(row, blocksize=block, compress_statistics=double, quant_type=kind)
        size = packed.numel() * packed.element_size() + state.absmax.numel() * state.absmax.element_size()
        if double:
            size += state.state2.absmax.numel() * 4
        return bnb.dequantize_4bit(packed, state).view(weight.shape), size

    scales = 8 / block + 32 / (block * 256) if double else 32 / block
    name = f"{kind.upper()}{' + double quantization' if double else ''}"
    return Scheme(name if block == BLOCK else f"{name}, block {block}", 4 + scales, apply)


def clustered(levels: int = 16) -> Scheme:
    """One codebook a weight, by Lloyd's algorithm (k-means) from evenly spread quantiles."""

    def apply(weight: Tensor) -> tuple[Tensor, int]:
        flat = weight.reshape(-1)
        step = max(1, flat.numel() // _SAMPLE)
        sample = flat[::step].sort().values
        at = ((torch.arange(levels) + 0.5) / levels * sample.numel()).long()
        centers = sample[at].clone()
        sums = torch.cat([sample.new_zeros(1, dtype=torch.float64), sample.double().cumsum(0)])
        for _ in range(_ROUNDS):
            edges = torch.searchsorted(sample, (centers[1:] + centers[:-1]) / 2)
            ends = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), sample.numel())])
            counts = ends.diff()
            means = (sums[ends[1:]] - sums[ends[:-1]]) / counts.clamp(min=1)
            centers = torch.where(counts > 0, means.float(), centers)
        found = centers[torch.bucketize(flat, (centers[1:] + centers[:-1]) / 2)]
        return found.view(weight.shape), flat.numel() // 2 + 4 * levels

    return Scheme(f"k-means, {levels} levels", 4.0, apply)


def pruned(share: float, then: Scheme) -> Scheme:
    """The smallest ``share`` of the weights set to zero, and ``then`` quantized; stored densely."""

    def apply(weight: Tensor) -> tuple[Tensor, int]:
        magnitudes = weight.abs().reshape(-1)
        least = magnitudes.kthvalue(max(1, int(share * magnitudes.numel()))).values
        return then.apply(torch.where(weight.abs() > least, weight, 0.0))

    return Scheme(f"{share:.0%} pruned, {then.name}", then.bits, apply)


NF4 = four_bits("nf4", double=True)
COMPARED: tuple[Scheme, ...] = (
    uniform(8),
    uniform(4),
    four_bits("fp4"),
    four_bits("nf4"),
    NF4,
    clustered(),
    pruned(0.5, NF4),
)
"""What is compared at a block of 64 weights."""

SIZES: tuple[Scheme, ...] = tuple(four_bits("nf4", block=block) for block in BLOCKS if block != BLOCK)
"""NF4 with other blocks."""


def drift(
    weight: Tensor, rounds: tuple[int, ...], *, update: float = 0.02, seed: int = 0
) -> dict[int, float]:
    """How far a 4-bit base is from itself after rounds of merging an adapter into it and taking it out again.

    Each round quantizes twice, as libraries do that merge for generation while they train. ``update`` is the norm of
    the adapter's product, of rank 16, over that of the weight. Returns the relative error after each of ``rounds``.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape
    product = torch.randn(rows, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
    base = NF4.apply(weight)[0]
    product *= update * base.norm() / product.norm()
    now, found = base, {}
    for number in range(1, max(rounds) + 1):
        now = NF4.apply(NF4.apply(now + product)[0] - product)[0]
        if number in rounds:
            found[number] = ((now - base).norm() / base.norm()).item()
    return found


def levels() -> Tensor:
    """The 16 levels of NF4, float32."""
    code: Any = bnb.get_4bit_type("nf4", device="cpu")
    found: Tensor = code
    return found


def _blocks(weight: Tensor, block: int) -> Tensor:
    flat = weight.reshape(-1)
    missing = -flat.numel() % block
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, block)


def _like(blocks: Tensor, weight: Tensor) -> Tensor:
    return blocks.reshape(-1)[: weight.numel()].view(weight.shape)
