"""Whole adapters in the checkpoints of sharded runs."""

from peft import PeftModel

from halfbyte.distributed import gathered_adapters
from halfbyte.trainer.base import Mixin


class WholeAdapters(Mixin):
    """Puts the whole adapter into checkpoints, beside the shards that a run resumes from."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        weights = gathered_adapters(self.model) if sharded and isinstance(self.model, PeftModel) else None
        if weights is None:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=weights)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
