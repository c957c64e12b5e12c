"""A base one parameter at a time, as loading it would make it: the model itself is never in memory."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import UserError
from halfbyte.quantization import packed
from halfbyte.quantization.checkpoint import weight_files
from halfbyte.quantization.load import load_base
from halfbyte.quantization.skeleton import without_weights
from halfbyte.quantization.stored import located
from halfbyte.task import Task

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Streamed:
    """The parameters of the checkpoint in ``directory`` under the names that ``model``, which is on meta, has.

    Linear layers that ``model`` has in four bits are quantized as they are read, unless the files hold them packed.
    """

    directory: Path
    model: PreTrainedModel

    def parameters(self) -> Iterator[tuple[str, Parts]]:
        """Each parameter with its tensors: "" alone, or what :func:`halfbyte.quantization.packed.pack` returns."""
        known = self.model.state_dict()
        for path in weight_files(self.directory):
            with safe_open(path, framework="pt") as file:
                names = sorted(file.keys())
                grouped: dict[str, list[str]] = {}
                for name in names:
                    grouped.setdefault(packed.parameter_of(name), []).append(name)
                for parameter, held in grouped.items():
                    if parameter in known:
                        parts = {name.removeprefix(parameter): file.get_tensor(name) for name in held}
                        yield parameter, self._as_loaded(parameter, parts, known[parameter])

    def _as_loaded(self, name: str, parts: Parts, like: Tensor) -> Parts:
        if packed.is_packed(parts):
            return parts
        value = parts[""]
        module = self.model.get_submodule(name.rpartition(".")[0])
        template = getattr(module, "weight", None)
        if name.endswith(".weight") and hasattr(template, "quant_type"):
            value = value.to(self.model.dtype)
            return packed.pack(value.T if issubclass(module.source_cls, Conv1D) else value, template)
        return {"": value.to(like.dtype) if value.is_floating_point() else value}


def read(
    directory: Path,
    *,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    task: Task,
    new: Collection[str] = (),
) -> "Streamed | Whole":
    """Return the parameters of the checkpoint in ``directory`` as they are loaded, read one by one if possible.

    The arguments are those of :func:`stream`.
    """
    found = stream(directory, quantization=quantization, dtype=dtype, task=task, new=new)
    if found is not None:
        return found
    cpu = torch.device("cpu")
    return Whole(load_base(str(directory), quantization=quantization, dtype=dtype, device=cpu, task=task))


@dataclass(frozen=True)
class Whole:
    """The parameters of a loaded model, as :class:`Streamed` gives them: for files that hold them otherwise."""

    model: PreTrainedModel

    def parameters(self) -> Iterator[tuple[str, Parts]]:
        """Each parameter with its tensors, and each buffer that is saved."""
        state = self.model.state_dict()
        grouped: dict[str, Parts] = {}
        for name, tensor in state.items():
            parameter = packed.parameter_of(name)
            grouped.setdefault(parameter, {})[name.removeprefix(parameter)] = tensor
        yield from grouped.items()


def stream(
    directory: Path,
    *,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    task: Task,
    new: Collection[str] = (),
    **origin: Any,
) -> Streamed | None:
    """Return the parameters of the checkpoint in ``directory`` as they are loaded in ``dtype``, quantized so.

    Parameters that are ``new`` are in none of the files, and left out. None where the files do not hold the model's
    parameters as they are: under other names, merged or split, in other formats than safetensors, or kept in float32
    by the architecture.
    """
    model = without_weights(directory, quantization=quantization, dtype=dtype, task=task, **origin)
    files = weight_files(directory)
    if not files or any(path.suffix != ".safetensors" for path in files):
        return None
    if get_model_conversion_mapping(model, add_legacy=False) or _kept_in_float32(model):
        return None
    held: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            held |= {packed.parameter_of(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    tied = set(model.all_tied_weights_keys)
    if set(model.state_dict()) - held - tied - set(new):
        return None
    return Streamed(directory, model)


def unquantized(name: str, revision: str) -> Path:
    """Return the directory of a checkpoint in 16 or 32 bits. Raises :class:`UserError` for one that is quantized."""
    directory = located(name, revision)
    if own_quantization(directory) is not None:
        raise UserError(f"{name!r} is quantized already; name its 16-bit checkpoint")
    return directory


def own_quantization(directory: Path) -> dict[str, Any] | None:
    """How the checkpoint in ``directory`` is quantized already, as its config.json says; None for one that is not."""
    found = json.loads((directory / "config.json").read_bytes()).get("quantization_config")
    return found if isinstance(found, dict) else None


def _kept_in_float32(model: nn.Module) -> bool:
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return any(getattr(module, name, None) for module in model.modules() for name in names)
