"""Whole adapters from a sharded model: what the Trainer would leave out of a checkpoint, or replace."""

from peft import PeftModel

from halfbyte.distributed import gathered_adapters
from halfbyte.trainer.base import Mixin


class WholeAdapters(Mixin):
    """Writes the whole adapter into each checkpoint, beside the shards that a resume reads.

    transformers 5.23 (``Trainer.save_model``) writes no adapter at all with sharded state dicts; with full ones it
    first gathers the whole base; under ZeRO-3 it writes the trained adapter in place of a frozen reference.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapters with their whole weights under FSDP2 and ZeRO-3, and as upstream does otherwise.

        A collective on a sharded model.
        """
        sharding = self.is_fsdp_enabled or self.is_deepspeed_enabled
        weights = gathered_adapters(self.model) if sharding and isinstance(self.model, PeftModel) else None
        if weights is None:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=weights)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
