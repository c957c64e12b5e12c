"""A trainer over a base loaded for it: what ``QLoRAPlugin.trainer`` and the command line share."""

from collections.abc import Iterable
from typing import Any

from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase, Trainer

from halfbyte import loading
from halfbyte.model_options import ModelOptions
from halfbyte.resolve import Decisions
from halfbyte.trainer.base import Conduct
from halfbyte.trainer.build import build


def assemble(
    options: ModelOptions,
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
        options,
        decisions,
        trust_remote_code=args.trust_remote_code,
        tokenizer=tokenizer,
        added_token_ids=added_token_ids,
        model_init_kwargs=args.model_init_kwargs,
    )
    return build(
        trainer_cls,
        loaded.model,
        loaded.coverage,
        args,
        mixins,
        conduct=conduct,
        fresh_adapter=decisions.adapter is None,
        initialization=options.init_lora_weights,
        loraplus_lr_ratio=options.loraplus_lr_ratio,
        fused=options.fast != "none",
        memory_budget=options.memory_budget,
        save_level=decisions.save_level,
        processing_class=tokenizer,
        **kwargs,
    )
