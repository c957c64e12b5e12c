"""The SFT recipe with a bitsandbytes optimizer on any device, as a third-party package.

Off CUDA halfbyte puts torch's AdamW in the place of a paged optimizer; this trainer does not ask it.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
from trl import SFTTrainer

from halfbyte_recipes.sft import SFTArguments
from halfbyte_recipes.sft import recipe as sft_recipe

ENTRY_POINTS = {"sharded-sft": "tests.distributed.optimizers:sft"}
OPTIMIZERS = {"paged_adamw_32bit": bnb.optim.PagedAdamW32bit, "lion_32bit": bnb.optim.Lion32bit}


@dataclass
class Arguments(SFTArguments):
    bitsandbytes_optimizer: str | None = field(
        default=None, metadata={"help": "The optimizer.", "choices": list(OPTIMIZERS)}
    )


class Trainer(SFTTrainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[type, dict[str, Any]]:
        if args.bitsandbytes_optimizer is None:
            return SFTTrainer.get_optimizer_cls_and_kwargs(args, model)
        return OPTIMIZERS[args.bitsandbytes_optimizer], {"lr": args.learning_rate}


sft = dataclasses.replace(sft_recipe, config=Arguments, trainer=Trainer)
