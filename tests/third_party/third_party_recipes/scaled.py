"""SFT whose loss is scaled by an option of its own."""

from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer

from halfbyte import Recipe


@dataclass
class ScaledConfig(SFTConfig):
    loss_scale: float = field(default=1.0, metadata={"help": "What the loss is multiplied by."})
    learning_rate: float = field(default=1e-2, metadata={"help": "The initial learning rate."})


class ScaledTrainer(SFTTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return (
            (loss[0] * self.args.loss_scale, *loss[1:])
            if isinstance(loss, tuple)
            else loss * self.args.loss_scale
        )


recipe = Recipe(config=ScaledConfig, trainer=ScaledTrainer, summary="SFT with a scaled loss")
