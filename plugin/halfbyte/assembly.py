"""A trainer over a base loaded for it: what ``QLoRAPlugin.trainer`` and the command line share."""

import copy
from collections.abc import Iterable
from typing import Any

from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase, Trainer

from halfbyte import data, loading
from halfbyte.loading import Loaded
from halfbyte.memory import Place
from halfbyte.model_options import ModelOptions
from halfbyte.resolve import Decisions
from halfbyte.task import by_trainer
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
    loaded: Loaded | None = None,
    conduct: Conduct | None = None,
    available: int | None = None,
    **kwargs: Any,
) -> Trainer:
    """Load, unless it is ``loaded`` already, and build as ``decisions`` say; ``kwargs`` are the trainer's own.

    Training arguments of transformers alone lack some fields of TRL's.
    """
    set_seed(args.seed)  # as TRL does before it makes an adapter: `seed` decides its start
    if loaded is None:
        # The trainer turns checkpointing on, as `args` say.
        loaded = loading.load(
            _of_its_task(options, trainer_cls),
            decisions,
            trust_remote_code=getattr(args, "trust_remote_code", False),
            tokenizer=tokenizer,
            added_token_ids=added_token_ids,
            model_init_kwargs=getattr(args, "model_init_kwargs", None),
        )
    return build(
        data.prepared_as_dpo(trainer_cls),
        loaded.model,
        loaded.coverage,
        args,
        mixins,
        place=Place(
            strategy=decisions.strategy.name,
            world_size=decisions.strategy.world_size,
            device=decisions.device.type,
            available=available,
        ),
        conduct=conduct,
        fresh_adapter=decisions.adapter is None,
        initialization=options.init_lora_weights,
        loraplus_lr_ratio=options.loraplus_lr_ratio,
        fused=options.fast != "none",
        memory_budget=options.memory_budget,
        token_budget=options.max_tokens_per_batch,
        save_level=decisions.save_level,
        processing_class=tokenizer,
        **kwargs,
    )


def _of_its_task(options: ModelOptions, trainer_cls: type[Trainer]) -> ModelOptions:
    """``options`` with the task of ``trainer_cls``, where it has only one."""
    task = by_trainer(trainer_cls)
    if task is None or task.peft_type == options.lora_task_type:
        return options
    changed = copy.copy(options)
    changed.lora_task_type = task.peft_type
    return changed
