"""The chunked LM head: the log-probabilities of labelled tokens, in the place of TRL's fused head.

TRL's (``trl.trainer.utils.add_fused_lm_head``) multiplies by the vocabulary three times and, off Triton devices, scores
prompts and padding too. The batch is either rows of labels, or a forest that says which of its tokens are scored
(:class:`halfbyte.fast.pairs.PairsAsTrees`).
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from halfbyte.fast import router_loss
from halfbyte.fast.forest import Forest, read_tokens
from halfbyte.fast.scores import OUTPUTS, USUAL, Scores, scores

# Configuration fields by which some architectures multiply their logits, as TRL's head reads them.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_CAP = "final_logit_softcapping"


def install(model: PreTrainedModel, outputs: tuple[str, ...] = USUAL) -> str | None:
    """Replace the fused head that TRL installed on ``model``; return why not, if it is not covered.

    ``model(..., labels=labels, fused_lm_head=True)``, with ``labels`` int64 ``[B, T]``, then returns ``log_probs`` and
    ``outputs`` ``[B, T-1]`` as TRL does. Only ``log_probs`` (and ``loss``) has a gradient, which reaches the backbone,
    not the head. With ``stream_ids`` the model runs on the forest, and the labels say what of it is returned where.
    Of a reference, which is scored without gradients in training, only ``log_probs`` is read: the rest is None.
    Replaces the instance's ``forward``, as TRL does.
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
        told = () if _is_reference(self) else outputs
        if "stream_ids" in kwargs:
            assert labels is not None
            return _of_forest(self, labels[:, 1:], told, **kwargs)
        kwargs["use_cache"] = False
        routed = router_loss.requested(self, kwargs) and not _is_reference(self)
        if routed:
            kwargs["output_router_logits"] = True
        backbone = self.base_model(*args, **kwargs)
        hidden = backbone.last_hidden_state
        if shift_labels is None:
            assert labels is not None
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        output = _of_rows(self, hidden, shift_labels, told, num_items_in_batch)
        return _with_router_loss(self, output, backbone, kwargs.get("attention_mask")) if routed else output

    model.forward = types.MethodType(forward, model)
    return None


def _uncovered(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return f"the output head is wrapped in {type(head).__name__}"
    if head.weight.requires_grad:
        return "the output head is trained"
    return None


def _scale(config: Any) -> float:
    """What the logits are multiplied by, before the soft cap."""
    factor = next((value for name in _SCALES if (value := getattr(config, name, None)) is not None), None)
    if factor is None and (divisor := getattr(config, "logits_scaling", None)) is not None:
        return float(divisor if config.model_type == "hyperclovax" else 1 / divisor)
    return 1.0 if factor is None else float(factor)


def _softcap(config: Any) -> float | None:
    """The bound of the logits; RecurrentGemma has a name of its own for it."""
    cap: float | None = getattr(config, _CAP, getattr(config, "logits_soft_cap", None))
    return cap


@contextmanager
def cap_for_trl(model: nn.Module) -> Iterator[None]:
    """Name the soft cap of ``model`` as TRL's head reads it, which does so while a trainer is built."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    cap = _softcap(config)
    if cap is None or hasattr(config, _CAP):
        yield
        return
    setattr(config, _CAP, cap)
    try:
        yield
    finally:
        delattr(config, _CAP)


def _is_reference(model: PreTrainedModel) -> bool:
    """Whether the adapter is off, or TRL's frozen copy of it is on, in a step that trains."""
    if torch.is_grad_enabled() or not model.training:
        return False
    layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    return layer is not None and (layer.disable_adapters or "ref" in layer.active_adapters)


def _of_rows(
    model: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    told: tuple[str, ...],
    num_items_in_batch: Tensor | int | None,
) -> FusedCausalLMOutput:
    """Score ``labels`` ``[B, T]``, shifted already, by ``hidden`` ``[B, T, H]``."""
    labels = labels.to(hidden.device)
    mask = labels != -100
    index = None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1)
    targets = labels.flatten() if index is None else labels.flatten()[index]
    found = _scores(model, hidden.reshape(-1, hidden.shape[-1]), targets, index, told)
    if index is None:
        return _output(found, mask, num_items_in_batch, lambda x: x.view(mask.shape))
    # masked_scatter keeps a batch without any label connected to the model: its gradient is zero.
    return _output(found, mask, num_items_in_batch, lambda x: x.new_zeros(mask.shape).masked_scatter(mask, x))


def _of_forest(
    model: PreTrainedModel,
    labels: Tensor,
    told: tuple[str, ...],
    *,
    stream_ids: Tensor,
    stream_positions: Tensor,
    forest: Tensor,
    scored: Tensor,
    scored_ids: Tensor,
    places: Tensor,
    **others: Any,
) -> FusedCausalLMOutput:
    """Score the tokens of a forest; ``labels`` ``[sequences, L]`` say where each sequence has one.

    The arguments are those of :class:`halfbyte.fast.pairs.PairsAsTrees`.
    """
    routed = router_loss.requested(model, others) and not _is_reference(model)
    backbone = model.base_model(
        input_ids=stream_ids,
        position_ids=stream_positions,
        attention_mask=forest,
        use_cache=False,
        **({"output_router_logits": True} if routed else {}),
    )
    hidden, index = backbone.last_hidden_state[0], scored[0]
    read = read_tokens(Forest.of_tensor(forest), index.device)
    if read is not None and len(hidden) == len(read):  # the last layer has left out the others
        index = torch.searchsorted(read, index)
    found = _scores(model, hidden, scored_ids[0], index, told)
    mask = labels != -100
    at = places[mask]
    output = _output(found, mask, None, lambda x: x.new_zeros(mask.shape).masked_scatter(mask, x[at]))
    return _with_router_loss(model, output, backbone, forest) if routed else output


def _with_router_loss(
    model: PreTrainedModel, output: FusedCausalLMOutput, backbone: Any, mask: Tensor | None
) -> FusedCausalLMOutput:
    """``output`` with the load-balancing loss of the tokens that ``mask`` weighs; see :mod:`.router_loss`."""
    loss = router_loss.router_loss(model, backbone.router_logits, mask)
    weight = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)
    output.aux_loss, output.loss = loss, output.loss + weight * loss
    return output


def _scores(
    model: PreTrainedModel, rows: Tensor, targets: Tensor, index: Tensor | None, told: tuple[str, ...]
) -> Scores:
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):  # FSDP2 shards the head, and this is outside its module's own forward
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None else None
    index = index.to(weight.device) if index is not None else None
    config = model.config.get_text_config()
    with maybe_gather_lm_head_ctx(weight, bias):
        return scores(
            rows.to(weight.device),
            weight,
            targets.to(weight.device),
            index,
            outputs=told,
            bias=bias,
            scale=_scale(config),
            softcap=_softcap(config),
        )


def _output(
    found: Scores, mask: Tensor, num_items_in_batch: Tensor | int | None, shaped: Callable[[Tensor], Tensor]
) -> FusedCausalLMOutput:
    """``found`` in the shape of ``mask``, which ``shaped`` gives to tensors ``[tokens]``."""
    log_probs = shaped(found.log_probs)
    told = {name: None if (value := getattr(found, name)) is None else shaped(value) for name in OUTPUTS}
    items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return FusedCausalLMOutput(loss=-log_probs.sum() / items, log_probs=log_probs, label_mask=mask, **told)
