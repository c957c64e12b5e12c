"""Quantized bases in the store: what decides the bytes of one, and a save that is verified by loading it again."""

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from halfbyte.quantization.checkpoint import directory_of

FORMAT = 1


def describe(name: str, revision: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """All that decides the bytes of a quantized base, or None if the checkpoint's files are not at hand.

    No weight is read: a file is told by its name in the hub's cache (a hash of its content), else by its path, size
    and modification time.
    """
    directory = directory_of(name, revision)
    if directory is None:
        return None
    weights = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".bin"))
    if not weights:
        return None
    return {
        "format": FORMAT,
        "config": hashlib.sha256((directory / "config.json").read_bytes()).hexdigest(),
        "weights": [_identity(path) for path in weights],
        "settings": {key: str(value) for key, value in sorted(settings.items())},
        "versions": {package: version(package) for package in ("bitsandbytes", "transformers")},
    }


def save(model: PreTrainedModel, entry: Path, reload: Callable[..., PreTrainedModel]) -> None:
    """Write ``model`` to ``entry``; ValueError if ``reload(entry, device)`` would load other bytes."""
    model.save_pretrained(entry, max_shard_size="4GB")
    written = reload(entry, torch.device("cpu")).state_dict()
    expected = model.state_dict()
    if written.keys() != expected.keys():
        raise ValueError("saved and loaded again, this architecture has other weights")
    for name, tensor in expected.items():
        if not same_bytes(tensor, written[name]):
            raise ValueError(f"saved and loaded again, {name} is not the same")


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of any shape and dtype are equal in dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def _identity(path: Path) -> list[Any]:
    real = path.resolve()
    if real.parent.name == "blobs":
        return [path.name, real.name]
    return [path.name, str(real), real.stat().st_size, real.stat().st_mtime_ns]
