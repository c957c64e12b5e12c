"""Padding-free batches: a forest in one row of tokens, which travels in the place of the attention mask.

TRL can collate rows of SFT without padding and transformers masks them, but the mask costs T^2 values: here it stays a
:class:`Forest`, and attention runs segment by segment (one variable-length kernel on CUDA). A batch that says only
where positions begin again gets its forest from the mask function, or beside the mask where a model (OPT) makes its
mask without looking at positions; one of trees brings its own. A model through which neither arrives is found out
before training and keeps padded batches.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from halfbyte.adapters import evaluating
from halfbyte.fast import reading
from halfbyte.fast.attention import attention as attention_of
from halfbyte.fast.forest import ROOT, Forest, once_per_tensor
from halfbyte.fast.parts import Uncovered
from halfbyte.fast.stand_in import with_weights

IMPLEMENTATION = "sdpa_varlen"
# The same in the place of eager attention, for a soft cap or sinks: transformers refuses these every name with sdpa.
IN_PLACE_OF_EAGER = "varlen_eager"
_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Two sequences, of 2 and 3 tokens, as TRL packs them; and a pair that shares two tokens.
PACKED = Forest((2, 5), (ROOT, ROOT))
PAIR = Forest((2, 3, 5), (ROOT, 0, 0))


def prepare_rows(model: PreTrainedModel, args: TrainingArguments, collator: Any) -> str | None:
    """Make ``model`` attend within each sequence of a padding-free batch; return why not, if it is not covered.

    ``args`` and ``collator`` are the SFT trainer's. Batches that TRL packs already keep their shape. The trainer itself
    changes its batches: :class:`halfbyte.trainer.padding_free.PaddingFree`.
    """
    if type(collator) is not DataCollatorForLanguageModeling:
        return f"the collator is {type(collator).__name__}"
    if collator.return_position_ids:
        return "sequence parallelism requires padding"
    reason = _uncovered(model, args, collator, _ATTENTION_LAYERS)
    if reason is None and model.config._attn_implementation in _FLASH:
        return None
    return reason or use_forests(model, PACKED)


def prepare_pairs(model: PreTrainedModel, args: TrainingArguments, collator: Any) -> str | None:
    """Make ``model`` attend along the paths of a batch of trees; return why not, if it is not covered.

    ``args`` and ``collator`` are the DPO trainer's; :class:`halfbyte.fast.pairs.PairsAsTrees` makes the batches.
    """
    if type(collator) is not DataCollatorForPreference:
        return f"the collator is {type(collator).__name__}"
    reason = _uncovered(model, args, collator, _ATTENTION_LAYERS - {"chunked_attention"})
    dropout = getattr(model.config.get_text_config(), "attention_dropout", None)
    if reason is None and (dropout or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())):
        return "dropout, of which the sides would share one mask"
    before = model.config._attn_implementation
    reason = reason or use_forests(model, PAIR)
    if reason is None and not _computes_pairs(model):
        model.set_attn_implementation(before)
        return f"{type(model).__name__} computes other values on a pair than on its sides"
    return reason


def register() -> None:
    """Register :data:`IMPLEMENTATION` with transformers, for the process; registering twice changes nothing."""
    for name in (IMPLEMENTATION, IN_PLACE_OF_EAGER):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)


def _uncovered(
    model: PreTrainedModel, args: TrainingArguments, collator: Any, layers: set[str]
) -> str | None:
    loading: Any = args.accelerator_config
    if collator.pad_to_multiple_of:
        return "pad_to_multiple_of requires padding"
    if args.neftune_noise_alpha is not None and not getattr(collator, "padding_free", False):
        return "neftune_noise_alpha scales its noise by the length of a padded row"
    if loading.dispatch_batches or loading.split_batches:
        return "dispatch_batches and split_batches split a batch by rows"
    if (
        model._is_stateful
        or not set(getattr(model.config.get_text_config(), "layer_types", None) or ()) <= layers
    ):
        return f"{type(model).__name__} has layers that carry a state along the row"
    return None


def use_forests(model: PreTrainedModel, example: Forest = PACKED) -> str | None:
    """Make ``model`` use :data:`IMPLEMENTATION` for batches like ``example``; return why it cannot."""
    before = model.config._attn_implementation
    name = IMPLEMENTATION
    try:
        if before in ("eager", IN_PLACE_OF_EAGER) and _is_beyond_sdpa(model):
            name = IN_PLACE_OF_EAGER
    except Uncovered as reason:
        return str(reason)
    if before not in ("sdpa", IMPLEMENTATION) and name != IN_PLACE_OF_EAGER:
        return f"attention is {before}; sdpa is covered"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} does not use transformers' attention interface"
    register()
    model.set_attn_implementation(name)
    if model.config._attn_implementation == name and _arrives(model, example):
        return None
    model.set_attn_implementation(before)
    return f"{type(model).__name__} does not pass sequence boundaries to its attention"


def _is_beyond_sdpa(model: PreTrainedModel) -> bool:
    """Whether the attention of ``model`` has a soft cap or sinks, which sdpa has not: transformers then runs eager."""
    config = model.config.get_text_config()
    has_sinks = any(reading.sinks(module) is not None for module in model.modules())
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return (capped or has_sinks) and not getattr(config, "attention_dropout", 0)


class _Arrived(Exception):  # noqa: N818 -- not an error: it ends a forward that has shown what it was run for
    def __init__(self, forest: Forest | None) -> None:
        self.forest = forest


_probing = False


@torch.no_grad()
def _arrives(model: PreTrainedModel, forest: Forest) -> bool:
    """Whether ``forest`` reaches the first attention of ``model``."""
    global _probing
    model = with_weights(model, model.config._attn_implementation)
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(1, forest.ends[-1], dtype=torch.long, device=device)
    given: dict[str, Tensor] = {"position_ids": forest.positions().to(device)}
    if forest.branches:
        given["attention_mask"] = forest.tensor(device)
    else:
        given["cu_seq_lens_q"] = torch.tensor([0, *forest.ends], dtype=torch.int32, device=device)
    _probing = True
    try:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            model.base_model(input_ids=ids, use_cache=False, **given)
    except _Arrived as arrived:
        return arrived.forest == forest
    except Exception:  # whatever a model raises on such a batch, it keeps padded ones
        return False
    finally:
        _probing = False
    return False


def _computes_pairs(model: PreTrainedModel) -> bool:
    """Whether the sides of a pair are computed on a tree as they are alone: positions arrive as well.

    So does a window, where it is shorter than the pair's sides; a longer one changes nothing here.
    """
    model = with_weights(model, model.config._attn_implementation)
    embedding = model.get_input_embeddings().weight
    device, within = embedding.device, 1e-3 if embedding.dtype == torch.float32 else 0.1
    pair = Forest.of_lengths([3, 24, 5], PAIR.parents)  # far enough apart for a position of its own to show
    ids = torch.arange(pair.ends[-1], device=device).remainder(len(embedding))[None]
    with evaluating(model), torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        on_tree = model.base_model(
            input_ids=ids,
            position_ids=pair.positions().to(device),
            attention_mask=pair.tensor(device),
            use_cache=False,
        ).last_hidden_state
        for side in (1, 2):
            at = torch.cat([torch.arange(*pair.spans[segment], device=device) for segment in pair.path(side)])
            alone = model.base_model(input_ids=ids[:, at], use_cache=False).last_hidden_state
            if not (on_tree[:, at] - alone).norm() <= within * alone.norm():
                return False
    return True


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
    """Scaled dot-product attention; along the paths of a forest where one is given.

    ``query`` is ``[B, Nq, T, D]``, ``key`` and ``value`` ``[B, Nkv, T, D]``; returns ``[B, T, Nq, D]``. B is 1 where a
    forest is given: in the place of the mask, as :meth:`Forest.tensor` encodes it, or as ``cu_seq_lens_q`` where there
    is no mask at all. A mask beside these may be that of a window alone (gpt-oss): it holds within each sequence. The
    signature is that of transformers' attention functions.
    """
    forest = _forest_of(attention_mask, kwargs)
    # What sdpa adds to the scores, and attention in both directions.
    beyond = kwargs.get("position_bias") is not None or getattr(module, "is_causal", True) is False
    if _probing:
        raise _Arrived(None if beyond else forest)
    cumulative = kwargs.get("cu_seq_lens_q")
    if forest is None and attention_mask is not None and cumulative is not None:
        attention_mask = _within(attention_mask, Forest.of_cumulative(cumulative))
    cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    alike = cap is None and sinks is None
    if alike and (forest is None or query.shape[0] != 1 or beyond):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout and forest is not None:
        return _with_dropout(forest, module, (query, key, value), dropout, scaling, kwargs), None
    call = attention_of(
        query.device,
        query.dtype,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        None if forest is not None else attention_mask,
        forest,
        kwargs["sliding_window"] if "sliding_window" in kwargs else reading.window(module),
        cap=cap,
        sinks=sinks,
    )
    return call.attend(*(x.transpose(1, 2) for x in (query, key, value))), None


def _forest_of(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> Forest | None:
    if attention_mask is not None:
        return Forest.of_tensor(attention_mask).whole if attention_mask.dtype == torch.int32 else None
    cumulative = kwargs.get("cu_seq_lens_q")
    return None if cumulative is None else Forest.of_cumulative(cumulative)


@once_per_tensor
def _within(mask: Tensor, forest: Forest) -> Tensor:
    """``mask`` ``[1, 1, T, T]``, bool or added to the scores, that hides from a query what its sequence has not."""
    at = torch.arange(forest.ends[-1], device=mask.device)
    sequence = torch.bucketize(at, torch.tensor(forest.ends, device=mask.device), right=True)
    same = sequence[:, None] == sequence
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def _with_dropout(
    forest: Forest,
    module: torch.nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """PyTorch's attention with dropout, sequence by sequence."""
    assert not forest.branches
    lengths = [end - start for start, end in forest.spans]
    # Split, not sliced: the gradient of each slice would be as long as the row.
    sequences = zip(*(x.split(lengths, dim=2) for x in states), strict=True)
    given = {**kwargs, "is_causal": True, "dropout": dropout, "scaling": scaling}
    parts = [sdpa_attention_forward(module, q, k, v, None, **given)[0] for q, k, v in sequences]
    return torch.cat(parts, dim=1)


def mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Return transformers' sdpa mask, or a forest where the mask is causal within each sequence and no more.

    The mask is bool ``[B, 1, T, T]`` or None, the forest what :meth:`Forest.tensor` returns. The signature is that of
    transformers' mask functions.
    """
    forest = None
    # A mask that may be skipped is plainly causal or padded; one applied with vmap is a custom one.
    packed = not kwargs.get("allow_is_causal_skip", True) and not kwargs.get("use_vmap")
    if packed and batch_size == 1 and q_length == kv_length and kwargs.get("attention_mask") is None:
        forest = _sequences(q_length, kwargs["mask_function"], kwargs.get("device", "cpu"))
    if forest is None:
        return sdpa_mask(batch_size, q_length, kv_length, **kwargs)
    return forest.tensor(kwargs.get("device", "cpu"))


def _sequences(tokens: int, mask_function: Any, device: Any) -> Forest | None:
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
    return Forest.of_cumulative(cumulative)
