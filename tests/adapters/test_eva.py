"""EVA on layers that read latents, and on batches that are too small for it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn

from halfbyte import QLoRAPlugin, adapters
from halfbyte.errors import UserError
from tests import architectures
from tests.adapters.build import sft

MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
BATCH = {
    "input_ids": torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(0)),
    "attention_mask": MASK,
}


def test_the_directions_are_those_of_what_tokens_have_layers_read(tmp_path: Path) -> None:
    """Latents have a dimension of heads before the tokens; padding counts nowhere."""
    base = architectures.save(tmp_path / "base", "minicpm3")
    model = QLoRAPlugin(dtype="float32", lora_r=4, init_lora_weights="eva", fast="none").load(base)
    read: dict[str, torch.Tensor] = {}

    def keep(name: str, _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        read[name] = inputs[0].detach()

    layers = {name: each for name, each in model.named_modules() if hasattr(each, "lora_A")}
    handles = [each.register_forward_pre_hook(partial(keep, name)) for name, each in layers.items()]
    with adapters.evaluating(model):
        model(**BATCH)
    for handle in handles:
        handle.remove()
    adapters.initialize_eva(model, [BATCH])
    shapes = {name.rpartition(".")[2]: len(value.shape) for name, value in read.items()}
    assert shapes["kv_b_proj"] == 4
    assert shapes["q_a_proj"] == 3
    for name, layer in layers.items():
        inputs = read[name]
        rows = (inputs[:, 0] if inputs.dim() == 4 else inputs)[MASK.bool()]
        expected = IncrementalPCA(4, copy=True, lowrank=True, lowrank_seed=42)
        for _ in range(2):  # as long as PEFT looks whether they still change
            expected.partial_fit(rows.float())
        a: nn.Parameter = layer.lora_A["default"].weight  # type: ignore[index,union-attr,assignment]
        unit = a / a.norm(dim=1, keepdim=True)
        assert (unit @ expected.components_.float().T).det().abs().item() == pytest.approx(1, abs=1e-3), name


def test_fewer_tokens_in_a_batch_than_directions_are_refused(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT would read the batches again and again."""
    plugin = QLoRAPlugin(dtype="float32", init_lora_weights="eva", lora_r=200)
    with pytest.raises(
        UserError, match=r"'eva' finds 200 directions \(lora_r\).*the largest has \d+; raise per_dev"
    ):
        sft(plugin, model_dir("llama"), tmp_path)
