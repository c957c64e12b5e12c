"""State layers on a packed base where kernels are installed: no kernel is handed packed weights."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte import QLoRAPlugin
from tests import architectures, fake_kernels, forked

KERNELS = {
    "causal_conv1d": {"causal_conv1d_fn": "causal_conv1d_fn"},
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": "mamba2_chunk_scan",
        "mamba_split_conv1d_scan_combined": "mamba2_split_conv1d_scan_combined",
    },
}
# Its configurations differ in where the fused kernel is named.
FAMILIES = ["bamba", pytest.param("nemotron_h", marks=pytest.mark.faults)]
CALLED = ["causal_conv1d_fn", "mamba_chunk_scan_combined"]


def upstream(family: str) -> str:
    return f"transformers.models.{family}.modeling_{family}"


def trained(family: str, base: str, site: str | None, packed: bool) -> tuple[np.ndarray, list[str]]:
    """The logits of a model in training, and the kernels that were called; in a process of its own."""
    sys.path[:0] = [site] if site else []
    model: Any = QLoRAPlugin(dtype="float32", load_in_4bit=packed).load(base).train()
    kernels = fake_kernels.switch_on(upstream(family), KERNELS) if site else []
    logits = model(torch.arange(4, 24)[None]).logits
    logits.sum().backward()
    return logits.detach().numpy(), sorted({name for each in kernels for name in each.calls})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_is_handed_no_packed_weight(tmp_path: Path, family: str) -> None:
    base = architectures.save(tmp_path / "base", family)
    site = tmp_path / "site"
    fake_kernels.write(site, upstream(family), KERNELS)
    plain, _ = forked.call(trained, family, base, None, True)
    logits, called = forked.call(trained, family, base, str(site), True)
    assert called == CALLED
    np.testing.assert_allclose(logits, plain, atol=1e-6)
    # A dense one hands its weights to the fused kernel.
    _, called = forked.call(trained, family, base, str(site), False)
    assert called == [*CALLED, "mamba_split_conv1d_scan_combined"]
