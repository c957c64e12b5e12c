"""QLoRAPlugin: how to load a base in four bits, what adapters to put on it, and any TRL trainer over both."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import ModelConfig

from halfbyte import adapters, distributed, loading, optimizers, resolve
from halfbyte import fast as fast_step  # `fast` is an option here
from halfbyte.assembly import assemble
from halfbyte.errors import UserError
from halfbyte.trainer.build import with_values
from halfbyte.trainer.compose import LIBRARY
from halfbyte.wording import say


@dataclass
class QLoRAPlugin(ModelConfig):
    """How to load a base in four bits and what adapters to put on it; fields are spelt as in the YAML.

    A subclass of TRL's ``ModelConfig`` with QLoRA's defaults (arXiv 2305.14314): NF4, double quantization,
    adapters on every linear layer.
    """

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the base's 16-bit weights and of its computation; unset: bfloat16 where the device "
            "has it natively, else float16 (CUDA) or float32 (CPU).",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Whether to train adapters."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules."}
    )
    load_in_4bit: bool = field(default=True, metadata={"help": "Whether to load the base in 4 bits."})
    use_bnb_nested_quant: bool = field(
        default=True, metadata={"help": "Whether to quantize the quantization constants too."}
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Adapter to continue (sft), or to start from and to take as the reference (dpo)."},
    )
    init_lora_weights: str | None = field(
        default=None, metadata={"help": "Initialization of fresh adapters: default, gaussian or eva."}
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: learning rate of B over that of A."}
    )
    lora_exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get no adapter although a target matches them."}
    )
    additional_special_tokens: list[str] | None = field(
        default=None,
        metadata={"help": "Template tokens to add to the vocabulary; their embedding rows are trained."},
    )
    fast: str = field(
        default="auto",
        metadata={
            "help": "auto: the fused step where it covers the model; none: plain TRL, PEFT and bitsandbytes.",
            "choices": ["auto", "none"],
        },
    )
    memory_budget: str = field(
        default="auto",
        metadata={
            "help": "What fused layers may keep for the backward: auto (the fastest that fits what is free), min "
            "(recompute everything), or a size such as 20GiB."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        adapters.check_initialization(self.init_lora_weights)
        if self.fast not in ("auto", "none"):
            raise UserError(f"{self.fast!r} is not a choice; write `auto` or `none`", option="fast")
        fast_step.check_memory_budget(self.memory_budget)
        if not self.use_peft and (self.loraplus_lr_ratio is not None or self.init_lora_weights is not None):
            option = "loraplus_lr_ratio" if self.loraplus_lr_ratio is not None else "init_lora_weights"
            raise UserError(
                "has no effect without adapters; take it out, or `use_peft: false`", option=option
            )
        if self.load_in_4bit and not self.use_peft:
            raise UserError(
                "false on a 4-bit base trains nothing; write `load_in_4bit: false` as well to train the full "
                "model, or take `use_peft: false` out",
                option="use_peft",
            )

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
        loaded = loading.load(
            self,
            resolve.for_loop(self, model),
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
            added_token_ids=added_token_ids,
            model_init_kwargs=model_init_kwargs,
        ).model
        if gradient_checkpointing:
            loaded.gradient_checkpointing_enable({"use_reentrant": False})
            loaded.enable_input_require_grads()
        if self.fast != "none":
            fast_step.fuse(loaded, checkpointing=gradient_checkpointing, memory_budget=self.memory_budget)
        return loaded

    def trainer(
        self,
        trainer_cls: type[Trainer],
        *,
        model: str | None = None,
        args: Any,
        processing_class: PreTrainedTokenizerBase | None = None,
        added_token_ids: Iterable[int] = (),
        **kwargs: Any,
    ) -> Trainer:
        """Build ``trainer_cls``, any TRL trainer, over ``model`` loaded by this plugin.

        ``args`` is left as it is: what must change for 4-bit training is changed in a copy, and printed in one line
        each. Without ``processing_class`` the tokenizer is the adapter's or the base's. The trainer's ``report`` says
        how much of the base is in four bits and what of the step is fused.
        """
        distributed.refuse_unsupported()
        decisions = resolve.for_arguments(self, args, model)
        say(*decisions.lines, error=True)
        args = with_values(args, decisions.values)
        if processing_class is None:
            processing_class, added_token_ids = loading.load_tokenizer(self, decisions, args)
        trainer = assemble(
            self, trainer_cls, decisions, args, LIBRARY, processing_class, added_token_ids, **kwargs
        )
        say(trainer.report.fusion.line(), error=True)
        return trainer

    def optimizer(
        self, model: torch.nn.Module, *, lr: float = 2e-4, weight_decay: float = 0.0
    ) -> torch.optim.Optimizer:
        """Return the optimizer for a loop of one's own: paged 32-bit AdamW on CUDA, AdamW elsewhere."""
        return optimizers.create(model, lr=lr, weight_decay=weight_decay)
