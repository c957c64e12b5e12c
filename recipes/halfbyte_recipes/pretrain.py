"""Self-supervised training: next-token loss on plain text, packed into rows of ``max_length`` tokens.

As it stands it continues the pretraining of an existing model in QLoRA; with ``use_peft: false`` and
``load_in_4bit: false`` it trains all weights of a small one.
"""

from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer

from halfbyte.data import Text
from halfbyte.recipe import Recipe
from halfbyte.tracking.figures import LANGUAGE_MODELING


@dataclass
class PretrainArguments(SFTConfig):
    """TRL's SFT options for running text: no padding, and no token of a long document is dropped."""

    learning_rate: float = field(default=2e-4, metadata={"help": "The initial learning rate."})
    packing: bool = field(
        default=True, metadata={"help": "Whether to pack several texts into rows of `max_length` tokens."}
    )
    packing_strategy: str = field(
        default="wrapped",
        metadata={
            "help": "`wrapped` fills every row and cuts texts where it ends; `bfd_split` keeps texts whole "
            "where they fit; `bfd` drops what is longer than a row.",
            "choices": ["bfd", "bfd_split", "wrapped"],
        },
    )


recipe = Recipe(
    config=PretrainArguments,
    trainer=SFTTrainer,
    data=Text,
    figures=LANGUAGE_MODELING,
    summary="Next-token training on plain text: QLoRA on an existing model, or all weights of a small one",
    next="halfbyte sft --model_name_or_path {output_dir} --dataset_name DATA --output_dir {output_dir}-sft",
)
