"""State mixers: what they are estimated to keep is what autograd saves, and padding that they see is counted."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from halfbyte.fast import batches, rows
from halfbyte.memory import Workload
from halfbyte.memory.mixers import saved_of_row
from halfbyte.memory.step import activations
from tests.fast import test_rows

LONGEST = 48


def saved_by(mixer: nn.Module, row: Tensor) -> int:
    """Bytes that autograd saves of ``row`` in ``mixer``, its weights apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in mixer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        type(mixer).forward(mixer, row)
    return sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("name", ["lfm2", "mamba2", "qwen3_next", "jamba"])
def test_what_a_mixer_saves_is_counted_without_weights(name: str) -> None:
    model = test_rows.make(name)
    assert batches.use_forests(model) is None
    mixer: Any = rows.mixers(model)[0]
    mixer.requires_grad_(False)
    config = model.config.get_text_config()
    row = torch.randn(1, LONGEST, config.hidden_size, requires_grad=True)
    found = saved_of_row(mixer, config, LONGEST, 4)
    assert found == pytest.approx(saved_by(mixer, row), rel=0.02)


def test_a_mixer_that_requires_more_than_its_input_is_estimated_by_its_maps() -> None:
    class Timed(nn.Linear):
        layer_idx = 0

        def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
            return super().forward(hidden_states) + time

    assert saved_of_row(Timed(8, 8), LlamaConfig(hidden_size=8, num_attention_heads=2), LONGEST, 4) is None


def test_a_layer_with_a_mixer_has_room_for_its_gradients_and_padding() -> None:
    model = test_rows.make("lfm2")
    assert batches.use_forests(model) is None
    work = Workload(tokens=64, longest=32, optim="adamw_torch", checkpointing=False)
    packed, in_rows = (activations(model, replace(work, in_rows=n)).kept for n in (64, 128))
    assert packed == activations(model, work).kept
    assert 1.1 * packed < in_rows < 2 * packed
    rows.remove(model)
    assert activations(model, replace(work, in_rows=128)).kept < packed
