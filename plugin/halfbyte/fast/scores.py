"""Log-probabilities of tokens by chunks of the vocabulary's logits, with their gradient in the forward.

A token's log-probability depends on its own hidden state alone, so its gradient is computed while its logits are in
memory and weighted later by the gradient that arrives: two products, and any loss over the log-probabilities is right.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.fast.device import kernels

# What can be told of a scored token beside its log-probability, under TRL's names; every loss reads the first two.
USUAL = ("entropy", "is_top1")
OUTPUTS = (*USUAL, "mean_logits", "log_sum_sq_probs")


@dataclass(frozen=True)
class Scores:
    """What is told of scored tokens, float32 ``[tokens]`` each (``is_top1`` bool); None was not requested.

    ``entropy`` (nats) is that of the token's distribution, ``is_top1`` says whether the token is its likeliest one,
    ``mean_logits`` is the mean over the vocabulary, ``log_sum_sq_probs`` the logarithm of the sum of squared
    probabilities. Only ``log_probs`` has a gradient.
    """

    log_probs: Tensor
    entropy: Tensor | None
    is_top1: Tensor | None
    mean_logits: Tensor | None
    log_sum_sq_probs: Tensor | None


def scores(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    index: Tensor | None,
    *,
    outputs: tuple[str, ...] = USUAL,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Scores:
    """Score ``targets``, int64 ``[tokens]``, by the hidden states ``rows`` ``[N, H]`` at ``index`` (all where None).

    A row may score several targets. ``weight`` is ``[V, H]``, ``bias`` ``[V]``; logits are multiplied by ``scale``,
    then bounded by ``softcap``. ``outputs`` is a part of :data:`OUTPUTS`.
    """
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    needs_gradient = torch.is_grad_enabled() and rows.requires_grad
    with torch.autocast(device, enabled=False):
        found = _Scores.apply(
            rows.to(dtype),
            weight.detach().to(dtype),
            bias.detach().to(dtype) if bias is not None else None,
            index,
            targets,
            scale,
            softcap,
            outputs,
            needs_gradient,
        )
    return Scores(*found)


def chunk_rows(vocabulary: int, device: str) -> int:
    """Return how many tokens to score at a time: chunks that caches hold on a CPU, and that fill a GPU."""
    elements, least, most = (2**22, 64, 256) if device == "cpu" else (2**28, 512, 4096)
    return min(max(elements // vocabulary, least), most)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        outputs: tuple[str, ...],
        needs_gradient: bool,
    ) -> tuple[Tensor | None, ...]:
        count, chunk = len(targets), chunk_rows(weight.shape[0], rows.device.type)
        log_probs = torch.empty(count, dtype=torch.float32, device=rows.device)
        told = {
            name: torch.empty_like(log_probs, dtype=torch.bool if name == "is_top1" else None)
            for name in outputs
        }
        gradient = rows.new_empty(count, rows.shape[1]) if needs_gradient else None
        mean = None
        if (
            "mean_logits" in outputs and softcap is None
        ):  # the mean of the products is the product of the mean
            mean = weight.mean(0, dtype=torch.float32), 0.0 if bias is None else bias.float().mean()
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            states = rows[part] if index is None else rows[index[part]]
            logits = torch.mm(states, weight.t())
            if bias is not None:
                logits.add_(bias)
            if mean is not None:
                told["mean_logits"][part] = (states.float() @ mean[0]).add_(mean[1]).mul_(scale)
            wanted = tuple(name for name in outputs if name != "mean_logits" or mean is None)
            found, dlogits = _score(logits, targets[part], scale, softcap, wanted, needs_gradient)
            log_probs[part] = found.pop("log_probs")
            for name, values in found.items():
                told[name][part] = values
            if gradient is not None:
                torch.mm(dlogits.to(rows.dtype), weight, out=gradient[part])
            del logits, dlogits, found  # or the next chunk would be computed beside them
        ctx.save_for_backward(gradient, index)
        ctx.rows, ctx.scale = len(rows), scale
        ctx.mark_non_differentiable(*told.values())
        return (log_probs, *(told.get(name) for name in OUTPUTS))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradient, index = ctx.saved_tensors
        # Weighted in float32 and rounded once: 1 / tokens is not a bfloat16 number.
        weighted = torch.mul(gradient, (-ctx.scale * grad.float()).unsqueeze(1)).to(gradient.dtype)
        if index is not None:
            whole = weighted.new_zeros(ctx.rows, weighted.shape[1])
            weighted = whole.index_add_(0, index, weighted)
        return (weighted, *[None] * 8)


def _score(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    outputs: tuple[str, ...],
    needs_gradient: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Score a chunk by a kernel, where there is one that tells all ``outputs``, or by torch operations."""
    fused = kernels(logits)
    if fused is None or not set(outputs) <= set(USUAL):
        logits = logits.float()
        return score(logits if scale == 1 else logits.mul_(scale), targets, softcap, needs_gradient, outputs)
    logits = logits if scale == 1 else logits.mul_(scale)
    log_probs, entropy, top1, dlogits = fused.score(logits, targets, softcap, needs_gradient)
    told = {"entropy": entropy, "is_top1": top1}
    return {"log_probs": log_probs, **{name: told[name] for name in outputs}}, dlogits


def score(
    logits: Tensor,
    targets: Tensor,
    softcap: float | None,
    needs_gradient: bool,
    outputs: tuple[str, ...] = USUAL,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return log-probabilities and ``outputs`` of a chunk, and d(-log-probability)/d(logits); overwrites ``logits``.

    ``logits`` is float32 ``[tokens, V]``, ``targets`` int64 ``[tokens]``. On a tie the first of the likeliest tokens is
    the top one, as in TRL.
    """
    slope = None
    told: dict[str, Tensor] = {}
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if needs_gradient else None
        logits.mul_(softcap)
    if "mean_logits" in outputs:
        told["mean_logits"] = logits.mean(1)
    at = targets.unsqueeze(1)
    largest = logits.amax(1, keepdim=True)
    target = logits.gather(1, at)
    if "is_top1" in outputs:
        told["is_top1"] = _is_top1(logits, targets, largest == target)
    logits.sub_(largest)
    # In place where nothing reads the logits again.
    weights = logits.exp() if "entropy" in outputs else logits.exp_()
    total = weights.sum(1, keepdim=True)
    log_total = total.log()
    told["log_probs"] = (target - largest - log_total).squeeze(1)
    if "entropy" in outputs:
        told["entropy"] = (log_total - logits.mul_(weights).sum(1, keepdim=True) / total).squeeze(1)
    if "log_sum_sq_probs" in outputs:
        squares = torch.linalg.vecdot(weights, weights, dim=1)
        told["log_sum_sq_probs"] = squares.log() - 2 * log_total.squeeze(1)
    if needs_gradient:
        weights.div_(total)
        weights.scatter_add_(1, at, torch.full_like(target, -1.0))
        if slope is not None:
            weights.mul_(slope)
    return told, weights


def _is_top1(logits: Tensor, targets: Tensor, equals_largest: Tensor) -> Tensor:
    """Whether each target is the first of the likeliest: a search that only rows which may be right go through."""
    top1 = equals_largest.squeeze(1)
    likely = top1.nonzero().squeeze(1)
    top1[likely] = logits[likely].argmax(1) == targets[likely]
    return top1
