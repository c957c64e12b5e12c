"""Quantized bases in the store: what identifies one, how it is written, and what is compared after reloading it."""

import json
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

from halfbyte import files
from halfbyte.errors import UserError
from halfbyte.quantization import experts
from halfbyte.quantization.checkpoint import content, directory_of, require, weight_files

FORMAT = 2  # raised where other weights are packed than before: FalconLinear, stacks of experts


def describe(name: str, revision: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return what decides the bytes of a quantized base, or None if the checkpoint's files are not local.

    A file is identified by its content, which is read where it is not known: see :mod:`halfbyte.identity`.
    """
    directory = directory_of(name, revision)
    if directory is None:
        return None
    weights = weight_files(directory)
    if not weights:
        return None
    return {
        "format": FORMAT,
        "config": files.digest(directory / "config.json"),
        "weights": [[path.name, content(path)] for path in weights],
        "settings": {key: str(value) for key, value in sorted(settings.items())},
        "versions": {package: version(package) for package in ("bitsandbytes", "transformers")},
    }


def download(name: str, revision: str) -> None:
    """Download the weight files of a hub model, so that :func:`describe` can identify them."""
    if Path(name).is_dir():
        return
    with suppress(OSError):  # other formats, or no connection: loading itself reports what is wrong
        index = cached_file(
            name,
            "model.safetensors.index.json",
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
        shards = {"model.safetensors"}
        if index is not None:
            shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        for shard in sorted(shards):
            cached_file(name, shard, revision=revision, _raise_exceptions_for_missing_entries=False)


def located(name: str, revision: str) -> Path:
    """Return the directory of a checkpoint, after its download if it is on the hub.

    Raises :class:`UserError` for one that is damaged, or not there.
    """
    require(name, revision)
    download(name, revision)
    directory = directory_of(name, revision)
    if directory is None:
        raise UserError(f"the base {name!r} ({revision}) is not on this machine, and cannot be downloaded")
    return directory


def save(model: PreTrainedModel, directory: Path, reload: Callable[[Path], PreTrainedModel]) -> None:
    """Write ``model`` to ``directory``. Raises ValueError if ``reload(directory)`` has other weights."""
    # Packed stacks of experts cannot be taken apart into the tensors that an architecture is published with.
    whole = not any(True for _ in experts.modules(model))
    model.save_pretrained(directory, max_shard_size="4GB", save_original_format=whole)
    reloaded = reload(directory).state_dict()
    weights = model.state_dict()
    if reloaded.keys() != weights.keys():
        raise ValueError("saved and loaded again, this architecture has other weights")
    for name, tensor in weights.items():
        if not same_bytes(tensor, reloaded[name]):
            raise ValueError(f"saved and loaded again, {name} is not the same")


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of any shape agree in dtype, shape and every byte."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))
