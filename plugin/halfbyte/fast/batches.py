"""Padding-free batches: a forest in one row of tokens, which travels in the place of the attention mask.

TRL can collate rows of SFT without padding; here attention runs sequence by sequence on them
(:mod:`halfbyte.fast.varlen`), and what else mixes tokens sees rows (:mod:`halfbyte.fast.rows`). A batch that says only
where positions begin again gets its forest from the mask function, or beside the mask where a model (OPT) makes its
mask without looking at positions; one of trees brings its own. A model through which neither arrives is found out
before training and keeps padded batches.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from halfbyte.adapters import evaluating
from halfbyte.fast import reading, rows, rows_proof, varlen
from halfbyte.fast.forest import ROOT, Forest
from halfbyte.fast.parts import Uncovered
from halfbyte.fast.stand_in import with_weights
from halfbyte.fast.varlen import IMPLEMENTATION, IN_PLACE_OF_EAGER
from halfbyte.state_kernels import torch_functions

_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Two sequences, of 2 and 3 tokens, as TRL packs them; and a pair that shares two tokens.
PACKED = Forest((2, 5), (ROOT, ROOT))
PAIR = Forest((2, 3, 5), (ROOT, 0, 0))


def prepare_rows(model: PreTrainedModel, args: TrainingArguments, collator: Any) -> str | None:
    """Make ``model`` keep the sequences of a padding-free batch apart; return why not, if it is not covered.

    ``args`` and ``collator`` are the SFT trainer's. Batches that TRL packs already keep their shape. The trainer itself
    changes its batches: :class:`halfbyte.trainer.padding_free.PaddingFree`.
    """
    if type(collator) is not DataCollatorForLanguageModeling:
        return f"the collator is {type(collator).__name__}"
    if collator.return_position_ids:
        return "sequence parallelism requires padding"
    reason = _uncovered(args, collator)
    if reason is None and model.config._attn_implementation in _FLASH and not _carries_a_state(model):
        return None
    return reason or use_forests(model, PACKED)


def prepare_pairs(model: PreTrainedModel, args: TrainingArguments, collator: Any) -> str | None:
    """Make ``model`` compute along the paths of a batch of trees; return why not, if it is not covered.

    ``args`` and ``collator`` are the DPO trainer's; :class:`halfbyte.fast.pairs.PairsAsTrees` makes the batches.
    """
    if type(collator) is not DataCollatorForPreference:
        return f"the collator is {type(collator).__name__}"
    reason = _uncovered(args, collator)
    dropout = getattr(model.config.get_text_config(), "attention_dropout", None)
    if reason is None and (dropout or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())):
        return "dropout, of which the sides would share one mask"
    if reason is not None:
        return reason
    before = model.config._attn_implementation
    shown = _using_forests(model, PAIR)
    if isinstance(shown, str):
        return shown
    if not _computes_pairs(shown):
        leave(model, before)
        return f"{type(model).__name__} computes other values on a pair than on its sides"
    return None


def _uncovered(args: TrainingArguments, collator: Any) -> str | None:
    loading: Any = args.accelerator_config
    if collator.pad_to_multiple_of:
        return "pad_to_multiple_of requires padding"
    if args.neftune_noise_alpha is not None and not getattr(collator, "padding_free", False):
        return "neftune_noise_alpha scales its noise by the length of a padded row"
    if loading.dispatch_batches or loading.split_batches:
        return "dispatch_batches and split_batches split a batch by rows"
    return None


def _layer_types(model: PreTrainedModel) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def _carries_a_state(model: PreTrainedModel) -> bool:
    """Whether ``model`` has layers that carry a state along the row, beside attention or without any."""
    return model._is_stateful or not _layer_types(model) <= _ATTENTION_LAYERS


def use_forests(model: PreTrainedModel, example: Forest = PACKED) -> str | None:
    """Make ``model`` keep sequences apart in batches like ``example``; return why it cannot."""
    shown = _using_forests(model, example)
    return shown if isinstance(shown, str) else None


def leave(model: PreTrainedModel, attention: str) -> None:
    """Undo :func:`use_forests` on ``model``, whose implementation of ``attention`` was this."""
    model.set_attn_implementation(attention)
    rows.remove(model)


def _using_forests(model: PreTrainedModel, example: Forest) -> PreTrainedModel | str:
    """``model``, or one with weights in the place of one on meta, after :func:`use_forests`; or why it cannot."""
    before = model.config._attn_implementation
    try:
        found = _use_forests(model, example)
    except Uncovered as reason:
        found = str(reason)
    if isinstance(found, str):
        leave(model, before)
    return found


def _use_forests(model: PreTrainedModel, example: Forest) -> PreTrainedModel | str:
    before, who = model.config._attn_implementation, type(model).__name__
    mixes = _carries_a_state(model)
    if before in ("sdpa", IMPLEMENTATION):
        name = IMPLEMENTATION
    elif before in ("eager", IN_PLACE_OF_EAGER) and _is_beyond_sdpa(model):
        name = IN_PLACE_OF_EAGER
    elif mixes and before == "eager" and not model._supports_sdpa:
        name = before  # of a model without attention
    else:
        return f"attention is {before}; sdpa is covered"
    if "chunked_attention" in _layer_types(model) and (mixes or example.branches):
        return f"{who} has attention in chunks"  # which the forest does not say
    if not (mixes or model._supports_attention_backend):
        return f"{who} does not use transformers' attention interface"
    mixed = rows_proof.prove(model, name, trees=example.branches) if mixes else None
    if isinstance(mixed, str):
        return mixed
    varlen.register()
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        return f"{who} does not use transformers' attention interface"
    shown = with_weights(model, model.config._attn_implementation)
    if mixed is not None:
        for each in {model, shown}:
            mixed.install(each)
    if not _arrives(shown, example):
        return f"{who} does not pass sequence boundaries to its attention"
    return shown


def _is_beyond_sdpa(model: PreTrainedModel) -> bool:
    """Whether the attention of ``model`` has a soft cap or sinks, which sdpa has not: transformers then runs eager."""
    config = model.config.get_text_config()
    has_sinks = any(reading.sinks(module) is not None for module in model.modules())
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return (capped or has_sinks) and not getattr(config, "attention_dropout", 0)


class _Arrived(Exception):  # noqa: N818 -- not an error: it ends a forward that has shown what it was run for
    def __init__(self, forest: Forest | None) -> None:
        self.forest = forest


def _on(device: torch.device, model: PreTrainedModel) -> AbstractContextManager[None]:
    """What ``model`` computes within on ``device``: kernels for a GPU are left to one."""
    return torch_functions(model) if device.type == "cpu" else nullcontext()


@torch.no_grad()
def _arrives(model: PreTrainedModel, forest: Forest) -> bool:
    """Whether ``forest`` reaches the first attention of ``model``, or its stack of layers where this hands it on."""
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(1, forest.ends[-1], dtype=torch.long, device=device)
    given: dict[str, Tensor] = {"position_ids": forest.positions().to(device)}
    if forest.branches:
        given["attention_mask"] = forest.tensor(device)
    else:
        given["cu_seq_lens_q"] = torch.tensor([0, *forest.ends], dtype=torch.int32, device=device)

    def stop(_: nn.Module, found: Forest | None) -> None:
        raise _Arrived(found)

    try:
        with (
            _on(device, model),
            varlen.observed(stop),
            torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]),
        ):
            model.base_model(input_ids=ids, use_cache=False, **given)
    except _Arrived as arrived:
        return arrived.forest == forest
    except Exception:  # whatever a model raises on such a batch, it keeps padded ones
        return False
    return False


def _computes_pairs(model: PreTrainedModel) -> bool:
    """Whether the sides of a pair are computed on a tree as they are alone: positions arrive as well.

    So does a window, where it is shorter than the pair's sides; a longer one changes nothing here.
    """
    embedding = model.get_input_embeddings().weight
    device, within = embedding.device, 1e-3 if embedding.dtype == torch.float32 else 0.1
    pair = Forest.of_lengths([3, 24, 5], PAIR.parents)  # far enough apart for a position of its own to show
    ids = torch.arange(pair.ends[-1], device=device).remainder(len(embedding))[None]
    with (
        _on(device, model),
        evaluating(model),
        torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]),
    ):
        on_tree = model.base_model(
            input_ids=ids,
            position_ids=pair.positions().to(device),
            attention_mask=pair.tensor(device),
            use_cache=False,
        ).last_hidden_state
        for side in (1, 2):
            at = pair.tokens(side, device)
            alone = model.base_model(input_ids=ids[:, at], use_cache=False).last_hidden_state
            if not (on_tree[:, at] - alone).norm() <= within * alone.norm():
                return False
    return True
