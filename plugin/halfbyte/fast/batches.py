"""Padding-free batches for SFT: sequences packed into one row, positions from 0 in each, attention within each alone.

TRL can collate such a row and transformers masks it, but the mask costs T^2 values: here it stays a tensor of
cumulative lengths, and attention runs sequence by sequence (one variable-length kernel on CUDA). The lengths travel in
the place of the mask, or beside it where a model (OPT) makes its mask without looking at positions. A model through
which neither arrives is found out before training and keeps padded batches.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

IMPLEMENTATION = "sdpa_varlen"
_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def prepare(model: PreTrainedModel, args: TrainingArguments, collator: Any) -> str | None:
    """Make ``model`` attend within each sequence of a padding-free batch; return why not, if it is not covered.

    ``args`` and ``collator`` are the SFT trainer's. Batches that TRL packs already keep their shape. The trainer itself
    changes its batches: :class:`halfbyte.trainer.padding_free.PaddingFree`.
    """
    return _uncovered(model, args, collator) or _use_attention(model)


def register() -> None:
    """Register :data:`IMPLEMENTATION` with transformers, for the process; registering twice changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)


def _uncovered(model: PreTrainedModel, args: TrainingArguments, collator: Any) -> str | None:
    loading: Any = args.accelerator_config
    if type(collator) is not DataCollatorForLanguageModeling:
        return f"the collator is {type(collator).__name__}"
    if collator.return_position_ids or collator.pad_to_multiple_of:
        return "pad_to_multiple_of and sequence parallelism require padding"
    if args.neftune_noise_alpha is not None and not collator.padding_free:
        return "neftune_noise_alpha scales its noise by the length of a padded row"
    if loading.dispatch_batches or loading.split_batches:
        return "dispatch_batches and split_batches split a batch by rows"
    if model._is_stateful or not set(getattr(model.config, "layer_types", None) or ()) <= _ATTENTION_LAYERS:
        return f"{type(model).__name__} has layers that carry a state along the row"
    return None


def _use_attention(model: PreTrainedModel) -> str | None:
    """Make ``model`` use :data:`IMPLEMENTATION`; return why it cannot."""
    before = model.config._attn_implementation
    if before in (*_FLASH, IMPLEMENTATION):
        return None
    if before != "sdpa":
        return f"attention is {before}; sdpa and flash attention are covered"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} does not use transformers' attention interface"
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation == IMPLEMENTATION and _boundaries_arrive(model):
        return None
    model.set_attn_implementation(before)
    return f"{type(model).__name__} does not pass sequence boundaries to its attention"


class _Arrived(Exception):  # noqa: N818 -- not an error: it ends a forward that has shown what it was run for
    def __init__(self, lengths: Tensor | None) -> None:
        self.lengths = lengths


_probing = False


@torch.no_grad()
def _boundaries_arrive(model: PreTrainedModel) -> bool:
    """Whether the boundaries of sequences of 2 and 3 tokens reach the first attention of ``model``."""
    global _probing
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(1, 5, dtype=torch.long, device=device)
    positions = torch.tensor([[0, 1, 0, 1, 2]], device=device)
    lengths = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    _probing = True
    try:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            model.base_model(input_ids=ids, position_ids=positions, use_cache=False, cu_seq_lens_q=lengths)
    except _Arrived as arrived:
        return arrived.lengths is not None and arrived.lengths.tolist() == [0, 2, 5]
    except Exception:  # whatever a model raises on such a batch, it keeps padded ones
        return False
    finally:
        _probing = False
    return False


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention; causal within each sequence where boundaries are given.

    ``query`` is ``[B, Nq, T, D]``, ``key`` and ``value`` ``[B, Nkv, T, D]``; returns ``[B, T, Nq, D]``. B is 1 where
    boundaries are given: cumulative lengths, int32, as :func:`mask` returns them in the place of the mask, or
    ``cu_seq_lens_q`` where there is no mask at all. The signature is that of transformers' attention functions.
    """
    lengths = kwargs.get("cu_seq_lens_q")
    if attention_mask is not None:
        lengths = attention_mask.flatten() if attention_mask.dtype == torch.int32 else None
    if _probing:
        raise _Arrived(lengths)
    if lengths is None or query.shape[0] != 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.dtype in (torch.float16, torch.bfloat16) and not dropout and _has_varlen(query.device):
        longest = kwargs.get("max_length_q") or query.shape[2]
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = varlen_attn(
            q, k, v, lengths, lengths, longest, longest, scale=scaling, window_size=(-1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        assert isinstance(out, Tensor)  # a tuple only where log-sums are requested
        return out.unsqueeze(0), None
    kwargs["is_causal"] = True
    # Split, not sliced: the gradient of each slice would be as long as the row.
    sequences = zip(*(x.split(lengths.diff().tolist(), dim=2) for x in (query, key, value)), strict=True)
    parts = [
        sdpa_attention_forward(module, q, k, v, None, dropout=dropout, scaling=scaling, **kwargs)[0]
        for q, k, v in sequences
    ]
    return torch.cat(parts, dim=1), None


def mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Return transformers' sdpa mask, or cumulative lengths where the mask is causal within each sequence and no more.

    The mask is bool ``[B, 1, T, T]`` or None; lengths are int32 ``[1, 1, 1, sequences + 1]``, from 0 to T. The
    signature is that of transformers' mask functions.
    """
    lengths = None
    # A mask that may be skipped is plainly causal or padded; one applied with vmap is a custom one.
    packed = not kwargs.get("allow_is_causal_skip", True) and not kwargs.get("use_vmap")
    if packed and batch_size == 1 and q_length == kv_length and kwargs.get("attention_mask") is None:
        lengths = _lengths(q_length, kwargs["mask_function"], kwargs.get("device", "cpu"))
    return sdpa_mask(batch_size, q_length, kv_length, **kwargs) if lengths is None else lengths


def _lengths(tokens: int, mask_function: Any, device: Any) -> Tensor | None:
    """Read sequence boundaries off a mask: a token sees the one before it unless it is the first of its sequence."""
    zero = torch.zeros(1, dtype=torch.long, device=device)
    at = torch.arange(tokens, device=device)
    sees_last = mask_function(zero, zero, at[1:], at[:-1])
    begins = (~sees_last).nonzero().squeeze(1) + 1
    cumulative = torch.cat([zero, begins, zero + tokens])
    first, last = cumulative[:-1], cumulative[1:] - 1
    sees_first = mask_function(zero, zero, last, first)  # no, where a window is shorter than the sequence
    sees_next = mask_function(zero, zero, at[:-1], at[1:])  # yes, where a block is not causal
    if not bool(sees_first.all()) or bool(sees_next.any()):
        return None
    return cumulative.to(torch.int32).view(1, 1, 1, -1)


def _has_varlen(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
