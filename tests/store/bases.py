"""Tiny bases through the store, and what is stored of them."""

import os
from pathlib import Path

import pytest
import torch

from halfbyte import quantization, store
from halfbyte.quantization import stored
from tests.plain_trl import nf4

CPU = torch.device("cpu")


def load(base: Path, **options):
    settings = nf4(bnb_4bit_use_double_quant=options.pop("nested", True))
    dtype = options.pop("dtype", torch.bfloat16)
    return quantization.load_base(str(base), quantization=settings, dtype=dtype, device=CPU, **options)


def directly(base: Path, monkeypatch: pytest.MonkeyPatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(stored, "describe", lambda *_: None)
        return load(base, **options)


def keys() -> list[str]:
    return [entry.key for entry in store.entries()]


def assert_equal(one, other) -> None:
    told, found = one.state_dict(), other.state_dict()
    assert told.keys() == found.keys()
    assert all(stored.same_bytes(told[name], found[name]) for name in told)


def release() -> None:
    while store._in_use:
        os.close(store._in_use.pop())
