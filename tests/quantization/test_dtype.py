"""The compute dtype: native bfloat16, float16 on older GPUs, the faster of two on CPUs."""

import pytest
import torch

from halfbyte.quantization import choose_compute_dtype

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),  # T4
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_cuda_goes_by_compute_capability(capability: tuple[int, int], expected: torch.dtype) -> None:
    assert choose_compute_dtype(CUDA, capability=lambda _: capability) == expected


@pytest.mark.parametrize(("faster", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cpu_goes_by_measurement(faster: bool, expected: torch.dtype) -> None:
    assert choose_compute_dtype(torch.device("cpu"), bfloat16_is_faster=lambda: faster) == expected


def test_the_cpu_measurement_runs() -> None:
    assert choose_compute_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)
