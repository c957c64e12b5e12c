"""The chunked LM head of an SFT step: log-probabilities of labelled tokens, with their gradient in the forward.

Replaces TRL's fused head (``trl.trainer.utils.add_fused_lm_head``), which multiplies by the vocabulary three times
and, off Triton devices, scores prompts and padding too. A token's log-probability depends on its own hidden state
alone, so its gradient is computed while its logits are in memory and weighted later by the gradient that arrives: two
products, and any loss over ``log_probs`` is right.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from halfbyte.fast.device import kernels

# Configuration fields by which some architectures scale their logits; TRL's head supports them all.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def install(model: PreTrainedModel) -> str | None:
    """Replace the fused head that TRL installed on ``model``; return why not, if it is not covered.

    ``model(..., labels=labels, fused_lm_head=True)``, with ``labels`` int64 ``[B, T]``, then returns ``log_probs``,
    ``entropy`` and ``is_top1`` ``[B, T-1]`` as TRL does. Only ``log_probs`` (and ``loss``) has a gradient, which
    reaches the backbone, not the head. Replaces the instance's ``forward``, as TRL does.
    """
    reason = _uncovered(model)
    if reason is not None:
        return reason
    trl_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or (labels is None and shift_labels is None):
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            kwargs.update({name: value for name, value in given.items() if value is not None})
            return trl_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        if shift_labels is None:
            assert labels is not None
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        return _outputs(self, hidden, shift_labels, num_items_in_batch)

    model.forward = types.MethodType(forward, model)
    return None


def _uncovered(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return f"the output head is wrapped in {type(head).__name__}"
    if head.weight.requires_grad:
        return "the output head is trained"
    if getattr(config, "output_router_logits", False):
        return "the model has a router loss"
    scale = next((name for name in _SCALES if getattr(config, name, None) not in (None, 1, 1.0)), None)
    return f"the model scales its logits ({scale})" if scale is not None else None


def _outputs(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None
) -> FusedCausalLMOutput:
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):  # FSDP2 shards the head, and this is outside its module's own forward
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None else None
    hidden, labels = hidden.to(weight.device), labels.to(weight.device)
    mask = labels != -100
    with maybe_gather_lm_head_ctx(weight, bias):
        log_probs, entropy, is_top1 = log_probabilities(
            hidden,
            weight,
            labels,
            mask,
            bias=bias,
            softcap=getattr(model.config.get_text_config(), "final_logit_softcapping", None),
        )
    items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / items,
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=mask,
    )


def log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probability of each label, the entropy of its distribution (nats), and whether it is the top one.

    ``hidden`` is ``[B, T, H]``, ``weight`` ``[V, H]``, ``bias`` ``[V]``, ``labels`` int64 and ``mask`` bool ``[B, T]``.
    All three are ``[B, T]``, float32 (the last bool) whatever the inputs are, and zero where ``mask`` is False.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    index = None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1)
    targets = labels.flatten() if index is None else labels.flatten()[index]
    needs_gradient = torch.is_grad_enabled() and hidden.requires_grad
    with torch.autocast(device, enabled=False):
        found = _LogProbs.apply(
            rows.to(dtype),
            weight.detach().to(dtype),
            bias.detach().to(dtype) if bias is not None else None,
            index,
            targets,
            softcap,
            chunk_rows(weight.shape[0], device),
            needs_gradient,
        )
    if index is None:
        log_probs, entropy, top1 = (x.view(mask.shape) for x in found)
    else:
        # masked_scatter keeps a batch without any label connected to the model: its gradient is zero.
        log_probs, entropy, top1 = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found)
    return log_probs, entropy, top1


def chunk_rows(vocabulary: int, device: str) -> int:
    """Return how many tokens to score at a time: chunks that caches hold on a CPU, and that fill a GPU."""
    elements, least, most = (2**22, 64, 256) if device == "cpu" else (2**28, 512, 4096)
    return min(max(elements // vocabulary, least), most)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        chunk: int,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(targets)
        log_probs = torch.empty(count, dtype=torch.float32, device=rows.device)
        entropy, top1 = torch.empty_like(log_probs), torch.empty_like(log_probs, dtype=torch.bool)
        gradient = rows.new_empty(count, rows.shape[1]) if needs_gradient else None
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            logits = torch.mm(rows[part] if index is None else rows[index[part]], weight.t())
            if bias is not None:
                logits.add_(bias)
            fused = kernels(logits)
            log_probs[part], entropy[part], top1[part], dlogits = (
                score(logits.float(), targets[part], softcap, needs_gradient)
                if fused is None
                else fused.score(logits, targets[part], softcap, needs_gradient)
            )
            if gradient is not None:
                torch.mm(dlogits.to(rows.dtype), weight, out=gradient[part])
            del logits, dlogits  # or the next chunk would be computed beside them
        ctx.save_for_backward(gradient, index)
        ctx.rows = len(rows)
        ctx.mark_non_differentiable(entropy, top1)
        return log_probs, entropy, top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradient, index = ctx.saved_tensors
        # Weighted in float32 and rounded once: 1 / tokens is not a bfloat16 number.
        weighted = torch.mul(gradient, -grad.float().unsqueeze(1)).to(gradient.dtype)
        if index is not None:
            whole = weighted.new_zeros(ctx.rows, weighted.shape[1])
            weighted = whole.index_copy_(0, index, weighted)
        return (weighted, *[None] * 7)


def score(
    logits: Tensor, targets: Tensor, softcap: float | None, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probability, entropy, top-1 and d(-log-probability)/d(logits) of a chunk; overwrites ``logits``.

    ``logits`` is float32 ``[B*T, V]``, ``targets`` int64 ``[B*T]``. On a tie the first of the likeliest tokens is the
    top one, as in TRL.
    """
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if needs_gradient else None
        logits.mul_(softcap)
    at = targets.unsqueeze(1)
    largest = logits.amax(1, keepdim=True)
    target = logits.gather(1, at)
    top1 = (target == largest).squeeze(1)
    # Whether it is the first of equals takes a search, which only rows that may be right go through.
    likely = top1.nonzero().squeeze(1)
    top1[likely] = logits[likely].argmax(1) == targets[likely]
    logits.sub_(largest)
    weights = logits.exp()
    total = weights.sum(1, keepdim=True)
    log_total = total.log()
    log_probs = (target - largest - log_total).squeeze(1)
    entropy = (log_total - logits.mul_(weights).sum(1, keepdim=True) / total).squeeze(1)
    if needs_gradient:
        weights.div_(total)
        weights.scatter_add_(1, at, torch.full_like(target, -1.0))
        if slope is not None:
            weights.mul_(slope)
    return log_probs, entropy, top1, weights
