"""QLoRAPlugin: how to load a base in four bits, what adapters to put on it, and any TRL trainer over both."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from halfbyte import distributed, given, loading, optimizers, resolve
from halfbyte import fast as fast_step  # `fast` is an option here
from halfbyte.assembly import assemble
from halfbyte.loading import Loaded
from halfbyte.model_options import ModelOptions
from halfbyte.terminal.wording import say
from halfbyte.trainer import trial
from halfbyte.trainer.build import with_values
from halfbyte.trainer.compose import LIBRARY


@dataclass
class QLoRAPlugin(ModelOptions):
    """How to load a base in four bits and what adapters to put on it; fields are spelt as in the YAML."""

    def load(
        self,
        model: str | None = None,
        *,
        gradient_checkpointing: bool = True,
        trust_remote_code: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        added_token_ids: Iterable[int] = (),
        **model_init_kwargs: Any,
    ) -> PreTrainedModel | PeftModel:
        """Load ``model`` for this rank: quantized, adapters on (float32) and fused, checkpointing on.

        ``model`` is a hub id, a directory, or an adapter directory, which stands for its base with that adapter. With
        ``tokenizer`` the embeddings grow where its vocabulary is larger. Without ``use_peft`` all of the model's
        weights are trained, in float32. Raises :class:`UserError` for a checkpoint or adapter that does not fit.
        """
        decisions = resolve.for_loop(self, model, model_init_kwargs)
        added_token_ids = tuple(added_token_ids)
        made = loading.load(
            self,
            decisions,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
            added_token_ids=added_token_ids,
            model_init_kwargs=decisions.values.get("model_init_kwargs", model_init_kwargs),
        )
        loaded = made.model
        if gradient_checkpointing:
            trial.check_checkpointing(loaded)
            loaded.gradient_checkpointing_enable({"use_reentrant": False})
            loaded.enable_input_require_grads()
        if self.fast != "none":
            fast_step.fuse(loaded, checkpointing=gradient_checkpointing)
        given.remember(loaded, given.Made(self, model, decisions.dtype, made.coverage, added_token_ids))
        return loaded

    def trainer(
        self,
        trainer_cls: type[Trainer],
        *,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: Any,
        processing_class: PreTrainedTokenizerBase | None = None,
        added_token_ids: Iterable[int] = (),
        **kwargs: Any,
    ) -> Trainer:
        """Build ``trainer_cls``, any TRL trainer or transformers', over ``model``: a name, or what ``load`` returned.

        ``args`` is left as it is: what must change for 4-bit training is changed in a copy, and printed in one line
        each. Without ``processing_class`` the tokenizer is the adapter's or the base's. The trainer's ``report`` says
        how much of the base is in four bits and what of the step is fused. Raises :class:`UserError` for a model that
        ``load`` of this plugin did not make, and for arguments of a trainer that would undo what the plugin does.
        """
        given.check(args, kwargs)
        plugin, loaded = self, None
        if model is not None and not isinstance(model, str):
            made = given.take(model, self)
            loaded = Loaded(model, made.coverage)
            plugin, model = replace(self, dtype=made.dtype), made.name
        distributed.refuse_unsupported()
        decisions = resolve.for_arguments(plugin, args, model)
        say(*decisions.lines, error=True)
        args = with_values(args, decisions.values)
        if processing_class is None:
            processing_class, added_token_ids = loading.load_tokenizer(plugin, decisions, args)
        if loaded is not None:
            given.check_tokens(loaded.model, made, processing_class, added_token_ids)
        trainer = assemble(
            plugin,
            trainer_cls,
            decisions,
            args,
            LIBRARY,
            processing_class,
            added_token_ids,
            loaded=loaded,
            **kwargs,
        )
        say(*trainer.report.lines(), error=True)
        return trainer

    def optimizer(
        self, model: torch.nn.Module, *, lr: float = 2e-4, weight_decay: float = 0.0
    ) -> torch.optim.Optimizer:
        """Return the optimizer for a loop of one's own: paged 32-bit AdamW on CUDA, AdamW elsewhere."""
        return optimizers.create(model, lr=lr, weight_decay=weight_decay)
