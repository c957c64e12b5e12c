"""What a model cannot be trained with is refused before the first step: one short forward, as the loss makes it."""

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from halfbyte.adapters import evaluating
from halfbyte.errors import UserError
from halfbyte.fast import autocast
from halfbyte.memory import is_planned
from halfbyte.terminal.wording import first_line, shorten

_TOKENS = 8
# The mean difference of log-probabilities that rounding cannot explain, over the spread of the logits.
_TOLERANCE = 0.1


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
            raise _refused(f"{name} fails on a text: {_said(error)}; use another model") from error
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
