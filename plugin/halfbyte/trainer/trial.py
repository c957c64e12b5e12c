"""What a model cannot be trained with is refused before the first step: one short forward, as the loss makes it."""

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from halfbyte.adapters import evaluating
from halfbyte.distributed import zero3
from halfbyte.errors import UserError
from halfbyte.fast import FusionReport, autocast
from halfbyte.fast.report import ON
from halfbyte.fast.stand_in import with_weights
from halfbyte.memory import is_planned
from halfbyte.state_kernels import calls_kernels
from halfbyte.terminal.wording import first_line, shorten

_TOKENS = 8
# The mean difference of log-probabilities that rounding cannot explain, over the spread of the logits.
_TOLERANCE = 0.1
# How much of its logits another sequence may change in a packed one, beside what experts round otherwise: a share, and
# how many times what a sequence after it changes.
_APART, _ROUNDING = 1e-3, 8
_ON_CPUS = ("eager", "sdpa")


def check_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Raise :class:`UserError` if ``model`` has no activation checkpointing."""
    base = _base(model)
    if not base.supports_gradient_checkpointing:
        raise UserError(
            f"{type(base).__name__} does not support activation checkpointing; write `gradient_checkpointing: false`",
            option="gradient_checkpointing",
        )


def check_loss(trainer: Trainer, model: PreTrainedModel | PeftModel) -> None:
    """Raise :class:`UserError` if the fused LM head that TRL put on ``model`` fails, or computes another loss.

    TRL's head (trl/trainer/utils.py, ``add_fused_lm_head``) multiplies the backbone's output by the output embeddings.
    Architectures with more between the two, with another backbone or other router outputs are not what it expects.
    """
    base: Any = _base(model)
    if not _has_fused_head(base) or is_deepspeed_zero3_enabled():  # there, no rank holds a whole weight
        return
    if is_planned(base):
        return
    name = type(base).__name__
    vocabulary = base.get_input_embeddings().weight
    ids = torch.arange(_TOKENS, device=vocabulary.device).remainder(vocabulary.shape[0])[None]
    router = hasattr(base.config.get_text_config(), "output_router_logits")
    without, asked = (
        {"output_router_logits": wanted} if router else {} for wanted in (False, _has_router_loss(trainer))
    )
    with (
        evaluating(base),
        torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []),
        # Trained copies of embeddings or head are float32 in a 16-bit base: a step casts between them.
        autocast.entered(trainer.args, ids.device),
    ):
        try:
            logits = base(input_ids=ids, **without).logits[:, :-1].float()
        except Exception as error:  # of any architecture
            in_8_bits = getattr(base, "is_loaded_in_8bit", False)
            do = "write `load_in_4bit: true`" if in_8_bits else "use another model"
            raise _refused(f"{name} fails on a text: {_said(error)}; {do}") from error
        try:
            found = base(input_ids=ids, labels=ids, fused_lm_head=True, **asked).log_probs
        except Exception as error:
            if _has_router_loss(trainer) and _runs(base, ids):
                raise UserError(
                    f"{name} has no load-balancing loss that TRL can compute ({_said(error)}); "
                    f"write `router_aux_loss_coef: 0.0`",
                    option="router_aux_loss_coef",
                ) from error
            raise _refused(
                f"TRL cannot compute the loss of {name} ({_said(error)}); use another model"
            ) from error
    if getattr(trainer.args, "temperature", 1.0) != 1.0:
        return
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    if (found.float() - expected).abs().mean() > _TOLERANCE * logits.std():
        raise _refused(
            f"TRL would compute another loss than {name} does, which has more than a product between its backbone "
            f"and its logits; use another model"
        )


def check_apart(trainer: Any, model: PreTrainedModel | PeftModel, fusion: FusionReport) -> None:
    """Raise :class:`UserError` if ``trainer`` collates padding-free batches whose sequences ``model`` joins.

    Those of ``packing`` and ``padding_free``, unless the fast step keeps sequences apart. Without the kernels for them
    transformers refuses such batches in some models, and lets states or attention pass on in others.
    """
    if not getattr(trainer.data_collator, "padding_free", False) or fusion.batches == ON:
        return
    base: Any = _base(model)
    if is_planned(base) and calls_kernels(base):  # in the place of a planned model is one on the CPU
        return
    attention = base.config._attn_implementation
    if attention not in _ON_CPUS:
        attention = "sdpa"
    with zero3.in_forward(base):
        reason = _joins(with_weights(base, attention), trainer)
    if reason is None:
        return
    option = "packing" if getattr(trainer.args, "packing", False) else "padding_free"
    do = f"write `{option}: false`"
    if fusion.mode == "none":
        do = f"leave `fast: auto`, which keeps those of most models apart, or {do}"
    elif fusion.batches is not None:
        reason += f", and the fast step does not keep them apart ({fusion.batches})"
    raise UserError(f"{type(base).__name__} {reason}; {do}", option=option)


@torch.no_grad()
def _joins(base: Any, trainer: Any) -> str | None:
    """Why a padding-free batch of ``trainer`` is not what its sequences are in ``base``; None where it is."""
    device, n = base.get_input_embeddings().weight.device, _TOKENS
    vocabulary = base.get_input_embeddings().weight.shape[0]
    one, two, own = ([token % vocabulary for token in range(start, start + n)] for start in (0, n, 2 * n))

    def logits(*sequences: list[int]) -> torch.Tensor:
        batch = trainer.data_collator([{"input_ids": each} for each in sequences])
        del batch["labels"]
        given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        found: torch.Tensor = base(**given, use_cache=False).logits[0].float()
        return found

    with (
        evaluating(base),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        autocast.entered(trainer.args, device),
    ):
        try:
            after, changed = (logits(each, own)[n : 2 * n] for each in (one, two))
            before, rounded = (logits(own, each)[:n] for each in (one, two))
        except Exception as error:  # of any architecture
            return f"fails on packed sequences ({_said(error)})"
    if (after - changed).norm() <= _APART * after.norm() + _ROUNDING * (before - rounded).norm():
        return None
    return "computes packed sequences as one, each from those before it"


def _runs(base: Any, ids: torch.Tensor) -> bool:
    """Whether the fused head runs without router logits."""
    config = base.config.get_text_config()
    asked, config.output_router_logits = config.output_router_logits, False
    try:
        base(input_ids=ids, labels=ids, fused_lm_head=True)
    except Exception:
        return False
    finally:
        config.output_router_logits = asked
    return True


def _has_router_loss(trainer: Any) -> bool:
    return bool(getattr(trainer, "aux_loss_enabled", False))


def _has_fused_head(base: Any) -> bool:
    function = getattr(base.forward, "__func__", None)
    return function is not None and "fused_lm_head" in function.__code__.co_varnames


def _base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten(first_line(error), 120)}"


def _refused(what: str) -> UserError:
    return UserError(what, option="model_name_or_path")
