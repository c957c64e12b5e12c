"""Maps of one input taken as one: the stacked weights are bitsandbytes' own, bit for bit."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from halfbyte.fast.projections import Projections, _stacked, dequantized


def quantized(
    rows: int, columns: int = 64, *, nested: bool = True, storage: torch.dtype = torch.uint8
) -> nn.Linear:
    made = bnb.nn.Linear4bit(columns, rows, bias=False, compress_statistics=nested, quant_type="nf4")
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    options = {"quant_type": "nf4", "compress_statistics": nested, "quant_storage": storage}
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options).to("cpu")
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
def test_stacked_weights_are_those_of_each_map(
    nested: bool, storage: torch.dtype, dtype: torch.dtype
) -> None:
    bases = [quantized(rows, nested=nested, storage=storage) for rows in (96, 32, 513)]
    assert _stacked(bases) is not None
    expected = torch.cat([dequantized(base, dtype) for base in bases])
    assert torch.equal(Projections(bases, [None] * 3).weight(dtype), expected)


@pytest.mark.parametrize(
    "bases",
    [
        [quantized(96), nn.Linear(64, 32, bias=False)],
        [quantized(3, 32), quantized(4, 32)],  # one and a half blocks of 64 in the first
        [quantized(96), quantized(32, storage=torch.bfloat16)],
    ],
)
def test_maps_that_cannot_be_put_end_to_end(bases: list[nn.Linear]) -> None:
    assert _stacked(bases) is None
    expected = torch.cat([dequantized(base, torch.float32) for base in bases])
    assert torch.equal(Projections(bases, [None, None]).weight(torch.float32), expected)


def test_a_part_of_a_weight_is_not_read_past() -> None:
    whole, part = quantized(96), quantized(32)
    part.weight.data = part.weight.data[:8]
    with pytest.raises(AssertionError, match="not gathered"):
        Projections([whole, part], [None, None]).weight(torch.float32)
