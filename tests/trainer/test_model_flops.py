"""FLOPs of a token, counted by hand for a tiny model."""

from collections.abc import Callable
from pathlib import Path

from halfbyte import QLoRAPlugin
from halfbyte.trainer.model_flops import flops_per_token

HIDDEN, KEYS, WIDE, LAYERS, VOCABULARY, RANK = 64, 32, 128, 2, 320, 4


def test_frozen_weights_take_two_products_and_trained_ones_three(model_dir: Callable[..., Path]) -> None:
    shapes = [
        *((HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)),
        *((HIDDEN, WIDE), (HIDDEN, WIDE), (WIDE, HIDDEN)),
    ]
    model = QLoRAPlugin(dtype="float32", lora_r=RANK).load(str(model_dir("llama")))
    frozen = LAYERS * sum(a * b for a, b in shapes) + HIDDEN * VOCABULARY
    trained = LAYERS * sum(RANK * (a + b) for a, b in shapes)
    assert flops_per_token(model) == 4 * frozen + 6 * trained
