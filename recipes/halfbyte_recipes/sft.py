"""Supervised fine-tuning: next-token loss on text, prompts with completions, or conversations."""

from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer

from halfbyte.data import Text
from halfbyte.recipe import Recipe
from halfbyte.tracking.figures import LANGUAGE_MODELING


@dataclass
class SFTArguments(SFTConfig):
    """TRL's SFT options with the learning rate of its LoRA examples."""

    learning_rate: float = field(default=2e-4, metadata={"help": "The initial learning rate."})


recipe = Recipe(
    config=SFTArguments,
    trainer=SFTTrainer,
    data=Text,
    figures=LANGUAGE_MODELING,
    summary="Supervised fine-tuning on text, prompt-completion pairs or conversations",
    next="halfbyte dpo {start} --dataset_name PREFERENCES --output_dir {output_dir}-dpo",
)
