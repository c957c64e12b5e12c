"""The states of the random generators that training draws from: taken, kept, restored."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def generators() -> tuple[Any, ...]:
    """The states of Python's, NumPy's and torch's random generators, those of every CUDA device among them."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def restore_generators(states: tuple[Any, ...]) -> None:
    """Put the generators back to what :func:`generators` returned."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state_all(states[3])


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the random generators after the block as they were before it."""
    states = generators()
    try:
        yield
    finally:
        restore_generators(states)
