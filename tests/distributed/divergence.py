"""The SFT recipe with a fault on one rank: weights that drift, or labels that only it counts."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTTrainer

from halfbyte_recipes.sft import SFTArguments
from halfbyte_recipes.sft import recipe as sft_recipe

ENTRY_POINTS = {"diverging-sft": "tests.distributed.divergence:sft"}
RANK = 1


@dataclass
class Arguments(SFTArguments):
    diverging: str = field(default="", metadata={"help": "`weights` (from step 2 on) or `labels`."})


class Trainer(SFTTrainer):
    def _diverges(self, what: str) -> bool:
        return self.args.diverging == what and self.accelerator.process_index == RANK

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._diverges("weights") and self.state.global_step == 1:
            first = next(parameter for parameter in self.model.parameters() if parameter.requires_grad)
            with torch.no_grad():
                first.view(-1)[0] += 1e-7
        return super().training_step(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, number = super().get_batch_samples(*args, **kwargs)
        return batches, number + 1 if self._diverges("labels") else number


sft = dataclasses.replace(sft_recipe, config=Arguments, trainer=Trainer)
