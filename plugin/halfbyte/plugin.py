"""QLoRAPlugin: one dataclass that loads a 4-bit base, puts adapters on it and builds any TRL trainer over it."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import ModelConfig, get_peft_config, get_quantization_config

from halfbyte import adapters, arguments, data, distributed, optimizers, quantization
from halfbyte import fast as fast_step  # `fast` is an option here
from halfbyte.distributed import fsdp2, zero3
from halfbyte.errors import UserError
from halfbyte.trainer.float32_adapters import Float32Adapters
from halfbyte.trainer.whole_adapters import WholeAdapters

_EVA_BATCHES = 32
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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

    coverage: quantization.Coverage | None = field(init=False, repr=False, compare=False, default=None)
    recorded_level: int | None = field(init=False, repr=False, compare=False, default=None)
    fast_path: fast_step.Path = field(init=False, repr=False, compare=False, default_factory=fast_step.Path)

    def __post_init__(self) -> None:
        super().__post_init__()
        adapters.check_initialization(self.init_lora_weights)
        if self.fast not in ("auto", "none"):
            raise UserError(f"fast: {self.fast!r} is not a choice; write `auto` or `none`")
        fast_step.check_memory_budget(self.memory_budget)
        if not self.use_peft and (self.loraplus_lr_ratio is not None or self.init_lora_weights is not None):
            option = "loraplus_lr_ratio" if self.loraplus_lr_ratio is not None else "init_lora_weights"
            raise UserError(f"{option}: has no effect without adapters; take it out, or `use_peft: false`")
        if self.load_in_4bit and not self.use_peft:
            raise UserError(
                "use_peft: false on a 4-bit base trains nothing; write `load_in_4bit: false` as well to train "
                "the full model, or take `use_peft: false` out"
            )

    def tokenizer(self, args: Any, model: str | None = None) -> tuple[PreTrainedTokenizerBase, list[int]]:
        """The tokenizer of the adapter to start from, else of the base, with its chat template in place.

        Returns it with the ids of the tokens that were added by name (``additional_special_tokens``).
        Raises :class:`UserError` if ``chat_template_path`` contradicts the template an adapter was trained with.
        """
        name, adapter = self.resolve(model)
        source = adapter if adapter is not None and _has_tokenizer(adapter) else name
        tokenizer, added = data.prepare_tokenizer(
            source,
            revision=self._revision(adapter) if source == name else "main",
            trust_remote_code=args.trust_remote_code,
            training=args,
            additional_special_tokens=self.additional_special_tokens,
        )
        if source == adapter and source != name:
            adapters.same_template(adapter, tokenizer, getattr(args, "chat_template_path", None))
        return tokenizer, added

    def base_record(self) -> dict[str, Any]:
        """What run.json says of the base: name, revision, fingerprint, and its bytes once it is loaded."""
        name, adapter = self.resolve()
        revision = self._revision(adapter)
        sha = quantization.fingerprint(name, revision)
        measured = self.coverage.as_dict() if self.coverage is not None else {}
        return {"name": name, "revision": revision, "sha": sha, **measured}

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype the base computes in on ``device``: what ``dtype`` says, else the device's best.

        Rank 0 decides for all.
        """
        if self.dtype is not None and self.dtype != "auto":
            return _DTYPES[self.dtype]
        return distributed.agree(quantization.choose_compute_dtype(device))

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

        ``model`` is a hub id, a directory, or an adapter directory, which stands for its base with that
        adapter. With ``tokenizer`` the embeddings grow where its vocabulary is larger. Without ``use_peft``
        all of the model's weights are trained, in float32.

        Raises :class:`UserError` for a checkpoint or adapter that does not fit; see :mod:`halfbyte.quantization`
        and :mod:`halfbyte.adapters`.
        """
        loaded = self._load(model, trust_remote_code, tokenizer, added_token_ids, model_init_kwargs)
        if gradient_checkpointing:
            loaded.gradient_checkpointing_enable({"use_reentrant": False})
            loaded.enable_input_require_grads()
        self._make_fast(loaded, checkpointing=gradient_checkpointing)
        return loaded

    def _load(
        self,
        model: str | None,
        trust_remote_code: bool,
        tokenizer: PreTrainedTokenizerBase | None,
        added_token_ids: Iterable[int],
        model_init_kwargs: dict[str, Any],
    ) -> PreTrainedModel | PeftModel:
        name, adapter = self.resolve(model)
        revision, device = self._revision(adapter), PartialState().device
        added_token_ids = list(added_token_ids)
        if adapter is not None:
            self._check_saved(adapter, name, revision, added_token_ids)
        base = self._load_base(name, revision, device, trust_remote_code, model_init_kwargs)
        if tokenizer is not None and len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
            # Mean resizing draws at random: the new rows must be the same on every rank and after a reload.
            base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if not self.use_peft:
            return base
        if adapter is not None:
            # Again: a base that was not on this machine has a fingerprint now.
            adapters.same_base(adapter, name, revision, quantization.fingerprint(name, revision))
            loaded = adapters.continue_from(base, adapter)
        else:
            loaded = adapters.attach(
                base,
                self.lora_config(),
                initialization=self.init_lora_weights,
                added_token_ids=added_token_ids,
            )
        distributed.check_adapters(loaded.peft_config.values())
        return loaded

    def _check_saved(self, adapter: str, base: str, revision: str, added_token_ids: list[int]) -> None:
        """Raise :class:`UserError` for what a saved adapter would silently not do; before the base is loaded."""
        if not self.use_peft:
            raise UserError(
                f"use_peft: false trains the base without the adapter {adapter!r}; take one of the two out"
            )
        if added_token_ids:
            raise UserError(
                f"additional_special_tokens: the adapter {adapter!r} was trained without them, and their rows would "
                f"stay as they are; name them where the adapter is made, or start a fresh one"
            )
        asked = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        defaults = vars(QLoRAPlugin())
        adapters.options_of(adapter, {key: value for key, value in asked.items() if value != defaults[key]})
        adapters.same_base(adapter, base, revision, quantization.fingerprint(base, revision))

    def _make_fast(
        self, model: PreTrainedModel | PeftModel, trainer: Trainer | None = None, *, checkpointing: bool
    ) -> None:
        refusal = fast_step.refusal(trainer.args if trainer is not None else None)
        if self.fast == "none" or refusal is not None:
            self.fast_path = fast_step.Path(mode="none", reason=refusal or "as given")
        else:
            self.fast_path = fast_step.apply(
                model,
                trainer,
                checkpointing=checkpointing,
                memory_budget=self.memory_budget,
                recorded_level=self.recorded_level,
            )

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

        ``args`` is taken as given; what must change for 4-bit training is changed and said in one line each.
        Without ``processing_class`` it is :meth:`tokenizer`'s, which also says which token ids were added.
        """
        distributed.refuse_unsupported()
        strategy = distributed.strategy_in_use(on_cpu=args.use_cpu)
        if strategy.name in distributed.SHARDED:
            distributed.check_quantized(strategy.name, self.load_in_4bit)
            distributed.check_optimizer(str(getattr(args.optim, "value", args.optim)))
        if strategy.name == "zero3":
            zero3.refuse_precision(self.dtype, bf16=args.bf16, fp16=args.fp16)
            zero3.refuse_loraplus(self.loraplus_lr_ratio)
        _, adapter = self.resolve(model)
        self.dtype, lines = arguments.mend(args, dtype=self.dtype, use_peft=self.use_peft)
        for line in lines:
            _say(line)
        if processing_class is None:
            processing_class, added_token_ids = self.tokenizer(args, model)
        set_seed(args.seed)  # as TRL does before it makes an adapter: `seed` decides its start
        # The trainer turns checkpointing on, as `args` say.
        loaded = self._load(
            model,
            args.trust_remote_code,
            processing_class,
            added_token_ids,
            dict(args.model_init_kwargs or {}),
        )
        composed = type(trainer_cls.__name__, (WholeAdapters, Float32Adapters, trainer_cls), {})
        with arguments.hidden(args, "model_init_kwargs", "chat_template_path"):
            trainer = composed(model=loaded, args=args, processing_class=processing_class, **kwargs)
        optimizers.check(args, loaded)
        if adapter is None:
            adapters.drop_reference_copy(loaded)
        if self.init_lora_weights == "eva" and adapter is None:
            adapters.initialize_eva(loaded, _first_batches(trainer))
        if self.loraplus_lr_ratio is not None:
            trainer.optimizer = optimizers.loraplus(args, loaded, self.loraplus_lr_ratio)
        self._make_fast(loaded, trainer, checkpointing=args.gradient_checkpointing)
        _say(self.fast_path.line())
        return trainer

    def optimizer(
        self, model: torch.nn.Module, *, lr: float = 2e-4, weight_decay: float = 0.0
    ) -> torch.optim.Optimizer:
        """The optimizer for a loop of one's own: paged 32-bit AdamW on CUDA, AdamW elsewhere."""
        return optimizers.create(model, lr=lr, weight_decay=weight_decay)

    def lora_config(self) -> LoraConfig:
        """The PEFT configuration of a fresh adapter."""
        config = get_peft_config(self)
        targets = config.target_modules
        if isinstance(targets, str) and targets.isidentifier():
            # TRL makes a list of one a string, which PEFT would read as a pattern for whole module paths.
            config.target_modules = {targets}
        if self.lora_exclude_modules:
            config.exclude_modules = set(self.lora_exclude_modules)
        config.revision = self.model_revision if self.model_revision != "main" else None
        return config

    def resolve(self, model: str | None = None) -> tuple[str, str | None]:
        """Return the base to load and the directory of the adapter to start from, if any.

        An adapter directory given as the model stands for its base and itself.
        """
        return adapters.resolve(model or self.model_name_or_path, self.adapter_name_or_path)

    def _revision(self, adapter: str | None) -> str:
        """The base's revision: the one that is given, else the one that the adapter was trained on."""
        if self.model_revision != "main" or adapter is None:
            return self.model_revision
        return adapters.revision_of(adapter)

    def _load_base(
        self,
        name: str,
        revision: str,
        device: torch.device,
        trust_remote_code: bool,
        model_init_kwargs: dict[str, Any],
    ) -> PreTrainedModel:
        dtype = self.compute_dtype(device)
        if not self.use_peft:
            dtype = torch.float32  # full-parameter training keeps its master weights in float32
        options = dict(model_init_kwargs)
        for key in ("revision", "trust_remote_code", "dtype", "device_map", "quantization_config"):
            if key in options:
                raise UserError(
                    f"model_init_kwargs: {key!r} has an option of its own in halfbyte; set that instead"
                )
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        base = quantization.load_base(
            name,
            quantization=self._quantization_config(dtype),
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            task_type=self.lora_task_type,
            **options,
        )
        if fsdp2.requested():
            fsdp2.check_base(base, dtype)
        self.coverage = quantization.measure_coverage(base)
        if self.load_in_4bit:
            self.coverage.require()
        return base

    def _quantization_config(self, dtype: torch.dtype) -> BitsAndBytesConfig | None:
        config = get_quantization_config(self)
        if config is not None and config.load_in_4bit:
            config.bnb_4bit_compute_dtype = dtype
            if fsdp2.requested():
                fsdp2.install()
                storage, line = fsdp2.quantization_storage(self.bnb_4bit_quant_storage, dtype)
                config.bnb_4bit_quant_storage = getattr(torch, storage or "uint8")
                if line is not None:
                    _say(line)
        return config


def _first_batches(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
    """The first collated training batches, the same on every rank and drawing no random numbers."""
    loader = DataLoader(
        trainer.train_dataset,
        batch_size=trainer.args.per_device_train_batch_size,
        collate_fn=trainer.data_collator,
    )
    return list(islice(loader, _EVA_BATCHES))


def _has_tokenizer(directory: str) -> bool:
    path = adapters.directory_of(directory)
    return path is not None and (path / "tokenizer_config.json").is_file()


def _say(line: str) -> None:
    if PartialState().is_main_process:
        print(line, file=sys.stderr)
