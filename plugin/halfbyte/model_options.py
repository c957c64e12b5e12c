"""The options of a model: how its base is quantized, which adapters it gets, and how its step is fused."""

from dataclasses import dataclass, field

from trl import ModelConfig

from halfbyte import adapters, memory
from halfbyte.config import check_values
from halfbyte.errors import UserError


@dataclass
class ModelOptions(ModelConfig):
    """TRL's ``ModelConfig`` with QLoRA's defaults (arXiv 2305.14314), and the options that halfbyte adds.

    NF4, double quantization, adapters on every linear layer. Raises :class:`UserError` for options that contradict
    each other.
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
        metadata={
            "help": "Adapter to continue (sft), or to start from and to take as the reference (dpo, kto)."
        },
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
        metadata={
            "help": "Template tokens to add to the vocabulary; their embedding rows are trained. []: what the template "
            "writes and the vocabulary lacks is ordinary text."
        },
    )
    fast: str = field(
        default="auto",
        metadata={
            "help": "auto: the fused step where it covers the model; none: plain TRL, PEFT and bitsandbytes.",
            "choices": ["auto", "none"],
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Close a micro-batch at so many tokens (what a pair has in common counts once), or at "
            "per_device_train_batch_size rows, whichever comes first; a longer row goes alone."
        },
    )
    memory_budget: str = field(
        default="auto",
        metadata={
            "help": "What layers may keep for the backward: auto (the fastest that fits what is free), min "
            "(recompute everything), or a size such as 20GiB."
        },
    )

    def __post_init__(self) -> None:
        check_values(self)
        super().__post_init__()
        adapters.check_initialization(self.init_lora_weights)
        memory.check_budget(self.memory_budget)
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
