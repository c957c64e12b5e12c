"""Adapters that TRL's constructors leave as they are: float32, with a complete reference."""

from typing import Any

import torch
from peft import PeftModel

from halfbyte import adapters
from halfbyte.trainer.base import Mixin


class Float32Adapters(Mixin):
    """Undoes what the constructor of a TRL trainer does to the adapters of a 4-bit model.

    TRL 1.16 rounds them to bfloat16 (trainer/sft_trainer.py:908, trainer/dpo_trainer.py:726), and copies them
    incompletely to the reference adapter (see :func:`halfbyte.adapters.restore`).
    """

    _initial: tuple[PeftModel, dict[str, torch.Tensor]] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, PeftModel):
            self._initial = model, adapters.trained_values(model)
        super().__init__(*args, **kwargs)

    def make_ready(self) -> None:
        initial, self._initial = self._initial, None
        if initial is not None:
            adapters.restore(*initial)
            adapters.keep_float32(initial[0])
        super().make_ready()
