"""LoRA+: another learning rate for B than for A."""

from typing import Any

from halfbyte import optimizers
from halfbyte.trainer.base import Mixin


class LoRAPlus(Mixin):
    """Makes the optimizer with B's learning rate a multiple of A's, where ``loraplus_lr_ratio`` is set."""

    loraplus_lr_ratio: float | None = None
    optimizer: Any

    def create_optimizer(self, model: Any = None) -> Any:
        """Return the Trainer's optimizer, or that of LoRA+ (arXiv 2402.12354)."""
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        self.optimizer = optimizers.loraplus(self.args, self.model, self.loraplus_lr_ratio)
        return self.optimizer
