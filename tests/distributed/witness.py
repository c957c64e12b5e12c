"""The shipped recipes with a trainer that saves what every rank holds, and can fail on one of them.

A stranger's package as far as halfbyte can see: its tests install it as one, and reach every rank through
options of its own instead of switches in the product.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from trl import DPOTrainer, SFTTrainer

from accelerate import PartialState
from halfbyte_recipes.dpo import DPOArguments
from halfbyte_recipes.dpo import recipe as dpo_recipe
from halfbyte_recipes.sft import SFTArguments
from halfbyte_recipes.sft import recipe as sft_recipe

ENTRY_POINTS = {
    "witness-sft": "tests.distributed.witness:sft",
    "witness-dpo": "tests.distributed.witness:dpo",
}


@dataclass
class Options:
    witness_dir: str | None = field(default=None, metadata={"help": "Where each rank saves its adapter."})
    failing_rank: int = field(default=-1, metadata={"help": "The rank that fails."})
    failing_at: str = field(default="step", metadata={"help": "`build`, `prepare` or `step`."})


@dataclass
class WitnessSFT(Options, SFTArguments):
    pass


@dataclass
class WitnessDPO(Options, DPOArguments):
    pass


class Witness:
    """A trainer of TRL that leaves ``rank-N.safetensors`` in ``witness_dir`` when it has trained."""

    args: Any
    model: Any
    accelerator: Any
    state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = kwargs["args"]
        super().__init__(*args, **kwargs)
        self._fail("build")

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        with PartialState().main_process_first():  # as TRL does around its own: a rank waits for another
            self._fail("prepare")
        return super()._prepare_dataset(*args, **kwargs)  # type: ignore[misc]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)  # type: ignore[misc]
        if self.args.witness_dir is not None:
            directory = Path(self.args.witness_dir)
            directory.mkdir(parents=True, exist_ok=True)
            weights = {
                name: parameter.detach().cpu().contiguous()
                for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters()
                if parameter.requires_grad
            }
            save_file(weights, directory / f"rank-{self.accelerator.process_index}.safetensors")
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            self._fail("step")
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def _fail(self, place: str) -> None:
        if self.args.failing_at == place and PartialState().process_index == self.args.failing_rank:
            raise ValueError(f"only rank {self.args.failing_rank} fails")


class WitnessSFTTrainer(Witness, SFTTrainer):
    pass


class WitnessDPOTrainer(Witness, DPOTrainer):
    pass


sft = dataclasses.replace(sft_recipe, config=WitnessSFT, trainer=WitnessSFTTrainer)
dpo = dataclasses.replace(dpo_recipe, config=WitnessDPO, trainer=WitnessDPOTrainer)
