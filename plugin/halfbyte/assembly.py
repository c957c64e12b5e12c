"""A trainer over a base loaded for it: what ``QLoRAPlugin.trainer`` and the command line share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase, Trainer

from halfbyte import loading
from halfbyte.trainer.base import Conduct
from halfbyte.trainer.build import build

if TYPE_CHECKING:
    from halfbyte.plugin import QLoRAPlugin
    from halfbyte.resolve import Decisions


def assemble(
    plugin: QLoRAPlugin,
    trainer_cls: type[Trainer],
    decisions: Decisions,
    args: Any,
    mixins: tuple[type, ...],
    tokenizer: PreTrainedTokenizerBase,
    added_token_ids: Iterable[int],
    *,
    conduct: Conduct | None = None,
    **kwargs: Any,
) -> Trainer:
    """Load and build as ``decisions`` say; ``kwargs`` are the trainer's own."""
    set_seed(args.seed)  # as TRL does before it makes an adapter: `seed` decides its start
    # The trainer turns checkpointing on, as `args` say.
    loaded = loading.load(
        plugin,
        decisions,
        trust_remote_code=args.trust_remote_code,
        tokenizer=tokenizer,
        added_token_ids=added_token_ids,
        model_init_kwargs=args.model_init_kwargs,
    )
    return build(
        trainer_cls,
        loaded,
        args,
        mixins,
        conduct=conduct,
        fresh_adapter=decisions.adapter is None,
        initialization=plugin.init_lora_weights,
        loraplus_lr_ratio=plugin.loraplus_lr_ratio,
        fused=plugin.fast != "none",
        memory_budget=plugin.memory_budget,
        save_level=decisions.save_level,
        processing_class=tokenizer,
        **kwargs,
    )
