"""Triton kernels for what torch cannot fuse on a GPU: RMSNorm, rotary embeddings, SwiGLU, both ways, and the LM head.

Each computes in float32 and rounds once, to the dtype of its input. Checked against the torch forms by Triton's
interpreter and compiled for Hopper; not yet run on a GPU. LoRA's product needs no kernel: with ``addmm_`` in place,
cuBLAS adds it while writing.
"""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements that a program holds at a time: they fit the registers of a block of threads.
_TILE = 4096
_GATE_BLOCK = 1024
_LOGITS_BLOCK = 4096


@triton.jit
def _whole_rows(x, weight, rows, offset, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr):
    """This program's tile of rows: row numbers, offsets, which offsets exist, values and scales."""
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)[:, None]
    column = tl.arange(0, block)[None, :]
    inside = (row < rows) & (column < width)
    at = row * width + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    return row, at, inside, value, scale


@triton.jit
def _norm_forward(
    x, weight, rows, y, inverse, eps,
    offset: tl.constexpr, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row, at, inside, value, scale = _whole_rows(x, weight, rows, offset, width, block, tile)
    rate = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / width + eps)
    tl.store(inverse + row, rate, mask=row < rows)
    tl.store(y + at, value * rate * scale, mask=inside)


@triton.jit
def _norm_backward(
    x, weight, rows, dy, inverse, residual, dx, around: tl.constexpr,
    offset: tl.constexpr, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row, at, inside, value, scale = _whole_rows(x, weight, rows, offset, width, block, tile)
    gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * scale
    rate = tl.load(inverse + row, mask=row < rows, other=0.0)
    along = tl.sum(gradient * value, axis=1, keep_dims=True) * rate * rate / width
    result = rate * (gradient - value * along)
    if around:
        result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at, result, mask=inside)


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    length,
    heads,
    x_batch,
    x_token,
    x_head,
    angle_batch,
    angle_token,
    half: tl.constexpr,
    step: tl.constexpr,
    gap: tl.constexpr,
    block: tl.constexpr,
    head_block: tl.constexpr,
):
    batch, token = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = tl.arange(0, head_block)[:, None]
    channel = tl.arange(0, block)[None, :]
    angle = batch * angle_batch + token * angle_token + channel
    c = tl.load(cos + angle, mask=channel < half, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=channel < half, other=0.0).to(tl.float32)
    at = x + batch * x_batch + token * x_token + head * x_head + channel * step
    inside = (head < heads) & (channel < half)
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + gap, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, first * c - second * s, mask=inside)
    tl.store(at + gap, second * c + first * s, mask=inside)


@triton.jit
def _swiglu_forward(gate_up, y, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _swiglu_backward(dy, gate_up, gradient, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    at = row * 2 * width + column
    product = dy + row * width + column
    d = tl.load(product, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(gradient + at, d * up * share * (1.0 + gate * (1.0 - share)), mask=inside)
    tl.store(gradient + at + width, d * gate * share, mask=inside)
    tl.store(product, gate * share * up, mask=inside)


@triton.jit
def _capped(logits, column, vocabulary, softcap: tl.constexpr):
    """Logits of a row in float32, after the soft cap if there is one; -inf outside the vocabulary."""
    value = tl.load(logits + column, mask=column < vocabulary, other=0.0).to(tl.float32)
    if softcap > 0:
        value = softcap * (2 * tl.sigmoid(2 * value / softcap) - 1)  # tanh
    return tl.where(column < vocabulary, value, float("-inf"))


@triton.jit
def _score(
    logits, targets, log_probs, entropy, top1, vocabulary,
    softcap: tl.constexpr, gradient: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    target = tl.load(targets + row)
    # Finite: its difference from the first maximum is multiplied by a total of zero.
    largest = -1e38
    winner = 0
    total = 0.0
    mean = 0.0
    for at in range(0, vocabulary, block):
        column = at + tl.arange(0, block)
        value = _capped(logits, column, vocabulary, softcap)
        best = tl.max(value, axis=0)
        winner = tl.where(best > largest, at + tl.argmax(value, axis=0), winner)
        top = tl.maximum(best, largest)
        shrunk = tl.exp(largest - top)
        weight = tl.exp(value - top)
        above = tl.where(column < vocabulary, value - top, 0.0)
        mean = shrunk * (mean + (largest - top) * total) + tl.sum(weight * above, axis=0)
        total = shrunk * total + tl.sum(weight, axis=0)
        largest = top
    log_total = tl.log(total)
    chosen = tl.sum(_capped(logits, target + tl.arange(0, 1), vocabulary, softcap), axis=0)
    tl.store(log_probs + row, chosen - largest - log_total)
    tl.store(entropy + row, log_total - mean / total)
    tl.store(top1 + row, winner == target)
    if gradient:
        for at in range(0, vocabulary, block):
            column = at + tl.arange(0, block)
            value = _capped(logits, column, vocabulary, softcap)
            slope = tl.exp(value - largest) / total - tl.where(column == target, 1.0, 0.0)
            if softcap > 0:
                slope *= 1.0 - (value / softcap) * (value / softcap)
            tl.store(logits + column, slope, mask=column < vocabulary)


def norm_forward(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, scaled_first: bool = True
) -> tuple[Tensor, Tensor]:
    """Return what :func:`halfbyte.fast.norm.norm_forward` does, rounded only once, after scaling."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty_like(rows)
    inverse = rows.new_empty(len(rows), 1, dtype=torch.float32)
    grid, shape = _row_tiles(rows)
    _norm_forward[grid](rows, weight, len(rows), y, inverse, eps, offset=float(unit_offset), **shape)
    return y.view(x.shape), inverse


def norm_backward(
    dy: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, unit_offset: bool, residual: Tensor | None
) -> Tensor:
    """Return what :func:`halfbyte.fast.norm.norm_backward` does."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    gradients = dy.reshape(rows.shape).contiguous()
    around = gradients if residual is None else residual.reshape(rows.shape).contiguous()
    dx = torch.empty_like(rows)
    grid, shape = _row_tiles(rows)
    options = {"offset": float(unit_offset), "around": residual is not None, **shape}
    _norm_backward[grid](rows, weight, len(rows), gradients, inverse, around, dx, **options)
    return dx.view(x.shape)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> Tensor:
    """Do what :func:`halfbyte.fast.rope.rotate_` does: ``x`` is ``[B, T, N, D]``, D contiguous."""
    assert x.stride(-1) == 1, x.stride()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, length, heads, size = x.shape
    _rotate[(batch, length)](
        x,
        cos,
        sin,
        length,
        heads,
        *x.stride()[:3],
        cos.stride(0) if len(cos) > 1 else 0,
        cos.stride(1),
        half=size // 2,
        step=2 if neighbours else 1,
        gap=1 if neighbours else size // 2,
        block=triton.next_power_of_2(size // 2),
        head_block=triton.next_power_of_2(heads),
    )
    return x


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, ``[B*T, F]``, for contiguous ``gate_up`` ``[B*T, 2F]``."""
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    y = gate_up.new_empty(tokens, width)
    _swiglu_forward[_gate_blocks(tokens, width)](gate_up, y, width, block=_GATE_BLOCK)
    return y


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``gate_up`` for contiguous ``dy`` ``[B*T, F]``; the product overwrites ``dy``."""
    tokens, width = dy.shape
    gradient = torch.empty_like(gate_up)
    _swiglu_backward[_gate_blocks(tokens, width)](dy, gate_up, gradient, width, block=_GATE_BLOCK)
    return gradient, dy


def score(
    logits: Tensor, targets: Tensor, softcap: float | None, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what :func:`halfbyte.fast.scores.score` does, for contiguous logits of any dtype, overwritten too."""
    count, vocabulary = logits.shape
    log_probs = torch.empty(count, dtype=torch.float32, device=logits.device)
    entropy, top1 = torch.empty_like(log_probs), torch.empty_like(log_probs, dtype=torch.bool)
    block = min(_LOGITS_BLOCK, triton.next_power_of_2(vocabulary))
    options = {"softcap": softcap or 0.0, "gradient": needs_gradient, "block": block}
    _score[(count,)](logits, targets, log_probs, entropy, top1, vocabulary, **options)
    return log_probs, entropy, top1, logits


def _row_tiles(rows: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the shape of tiles of whole rows."""
    count, width = rows.shape
    block = triton.next_power_of_2(width)
    tile = max(1, _TILE // block)
    warps = 8 if block >= _TILE else 4
    return (triton.cdiv(count, tile),), {"width": width, "block": block, "tile": tile, "num_warps": warps}


def _gate_blocks(tokens: int, width: int) -> tuple[int, int]:
    return tokens, triton.cdiv(width, _GATE_BLOCK)
