"""State layers where kernels for a GPU are installed: what they compute is shown on the CPU without these."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from halfbyte.fast import batches
from halfbyte.fast.proof import Proofs
from halfbyte.state_kernels import calls_kernels
from tests import fake_kernels, forked
from tests.fast import test_batches, test_rows

UPSTREAM = "transformers.models.qwen3_next.modeling_qwen3_next"
KERNELS = {
    "causal_conv1d": {"causal_conv1d_fn": "causal_conv1d_fn"},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": "torch_chunk_gated_delta_rule"},
}


def shown_and_trained(site: str | None) -> Any:
    """What is said of qwen3_next, its loss and gradients, and how often kernels were called; in its own process."""
    sys.path[:0] = [site] if site else []
    model = test_rows.make("qwen3_next")
    assert calls_kernels(model) is bool(site)
    reason = batches.use_forests(model)
    torch.manual_seed(0)
    layer = get_peft_model(model, LoraConfig(target_modules="all-linear")).base_model.model.model.layers[1]
    parts = sorted(Proofs(model).parts(layer))
    if site:
        with pytest.raises(
            RuntimeError, match="computes on a GPU"
        ):  # or transformers has learnt to leave them out
            model(torch.tensor([[4, 5]]))
    kernels = fake_kernels.switch_on(UPSTREAM, KERNELS) if site else []
    loss, gradients = test_batches.step(model, padding_free=True)
    calls = min((len(kernel.calls) for kernel in kernels), default=0)
    return (reason, parts), loss.item(), {name: value.numpy() for name, value in gradients.items()}, calls


def test_a_model_that_calls_kernels_is_shown_on_the_cpu(tmp_path: Path) -> None:
    fake_kernels.write(tmp_path, UPSTREAM, KERNELS)
    without, with_kernels = (forked.call(shown_and_trained, site) for site in (None, str(tmp_path)))
    assert with_kernels[0] == without[0] == (None, ["mlp.shared_expert", "self_attn"])
    assert with_kernels[1] == pytest.approx(without[1], abs=1e-6)
    assert with_kernels[2].keys() == without[2].keys()
    for name, value in without[2].items():
        assert torch.equal(torch.from_numpy(with_kernels[2][name]), torch.from_numpy(value)), name
    assert without[3] == 0
    assert with_kernels[3] > 0
