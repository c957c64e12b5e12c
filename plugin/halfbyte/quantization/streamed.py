"""A base one parameter at a time, as loading it would make it: the model itself is never in memory."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Params4bit
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import UserError
from halfbyte.multimodal import left_out
from halfbyte.quantization import experts, mxfp4, packed, quantizer
from halfbyte.quantization.checkpoint import weight_files
from halfbyte.quantization.load import load_base
from halfbyte.quantization.skeleton import without_weights
from halfbyte.quantization.stored import located
from halfbyte.task import Task

Parts = dict[str, Tensor]
# Conversions of a checkpoint that leave each tensor as it is.
_RENAMINGS = (WeightRenaming, PrefixChange)


@dataclass(frozen=True)
class Streamed:
    """The parameters of the checkpoint in ``directory`` under the names that ``model``, which is on meta, has.

    What ``model`` has in four bits is quantized as it is read, unless the files hold it packed; stacks of experts in
    MXFP4 are dequantized first. ``names`` are the parameters' names in the files, with those in ``model``.
    """

    directory: Path
    model: PreTrainedModel
    names: Mapping[str, str]

    def parameters(self) -> Iterator[tuple[str, Parts]]:
        """Each parameter with its tensors: "" alone, or what :func:`halfbyte.quantization.packed.pack` returns."""
        known = self.model.state_dict()
        files = {path: _tensors(path) for path in weight_files(self.directory)}
        places = {name: path for path, names in files.items() for name in names}
        grouped: dict[str, list[str]] = {}
        for name in places:
            grouped.setdefault(packed.parameter_of(name), []).append(name)
        for path in files:
            with safe_open(path, framework="pt") as file:
                for stored, held in grouped.items():
                    if places[held[0]] == path and (parameter := self.names[stored]) in known:
                        # A parameter of several tensors may begin at the end of one file.
                        parts = {
                            name.removeprefix(stored): file.get_tensor(name)
                            if places[name] == path
                            else _tensor(places[name], name)
                            for name in held
                        }
                        yield parameter, self._as_loaded(parameter, parts, known[parameter])

    def stored_as(self, parameter: str) -> str:
        """The name of a parameter in the files, or its own where they do not have it."""
        return next((stored for stored, name in self.names.items() if name == parameter), parameter)

    def beside(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a multimodal checkpoint that are not the language model's, as the files have them."""
        return _beside(self.directory, self.model, self.names)

    def _as_loaded(self, name: str, parts: Parts, like: Tensor) -> Parts:
        if packed.is_packed(parts):
            return parts
        value = mxfp4.unpack(parts, self.model.dtype) if mxfp4.is_mxfp4(parts) else parts[""]
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if isinstance(template := getattr(module, leaf, None), Params4bit):
            value = value.to(self.model.dtype)
            if leaf != "weight":
                return packed.parts_of(experts.pack(value, template))
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
    model = load_base(str(directory), quantization=quantization, dtype=dtype, device=cpu, task=task)
    return Whole(directory, model)


@dataclass(frozen=True)
class Whole:
    """The parameters of a loaded model, as :class:`Streamed` gives them: for files that hold them otherwise."""

    directory: Path
    model: PreTrainedModel

    def parameters(self) -> Iterator[tuple[str, Parts]]:
        """Each parameter with its tensors, and each buffer that is saved."""
        state = self.model.state_dict()
        grouped: dict[str, Parts] = {}
        for name, tensor in state.items():
            parameter = packed.parameter_of(name)
            grouped.setdefault(parameter, {})[name.removeprefix(parameter)] = tensor
        yield from grouped.items()

    def stored_as(self, parameter: str) -> str:
        """The name to write a parameter under: the model's own."""
        return parameter

    def beside(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a multimodal checkpoint that are not the language model's, as the files have them."""
        names = _names(self.directory, self.model, get_model_conversion_mapping(self.model, add_legacy=False))
        return _beside(self.directory, self.model, names)


def _names(directory: Path, model: PreTrainedModel, conversions: Sequence[WeightTransform]) -> dict[str, str]:
    """The parameters in the files of ``directory``, each with the name of what it is, or is part of, in ``model``."""
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state, found = model.state_dict(), {}
    for path in weight_files(directory):
        for name in _tensors(path):
            stored = packed.parameter_of(name)
            found[stored] = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)[
                0
            ]
    return found


def _tensors(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return sorted(file.keys())


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _beside(
    directory: Path, model: PreTrainedModel, names: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    if not left_out(model):
        return
    known = model.state_dict()
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if names[packed.parameter_of(name)] not in known:
                    yield name, file.get_tensor(name)


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
    parameters as they are: merged or split, in other formats than safetensors, or kept in float32 by the architecture.
    """
    model = without_weights(directory, quantization=quantization, dtype=dtype, task=task, **origin)
    files = weight_files(directory)
    if not files or any(path.suffix != ".safetensors" for path in files):
        return None
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(type(each) not in _RENAMINGS for each in conversions) or _kept_in_float32(model, dtype):
        return None
    names = _names(directory, model, conversions)
    tied = set(model.all_tied_weights_keys)
    if set(model.state_dict()) - set(names.values()) - tied - set(new):
        return None
    return Streamed(directory, model, names)


def unquantized(name: str, revision: str, requested: BitsAndBytesConfig | None = None) -> Path:
    """Return the directory of a checkpoint in 16 or 32 bits, or one that is packed anew as ``requested``.

    Raises :class:`UserError` for one that is quantized.
    """
    directory = located(name, revision)
    own = own_quantization(directory)
    if own is not None and not quantizer.is_packed_anew(own, requested):
        method = own.get("quant_method", "another method")
        raise UserError(f"{name!r} is quantized already, with {method}; name its 16-bit checkpoint")
    return directory


def own_quantization(directory: Path) -> dict[str, Any] | None:
    """How the checkpoint in ``directory`` is quantized already, as its config.json says; None for one that is not."""
    found = json.loads((directory / "config.json").read_bytes()).get("quantization_config")
    return found if isinstance(found, dict) else None


def _kept_in_float32(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether some parameters would be loaded in float32 where ``dtype`` is requested."""
    names = {
        torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
        torch.bfloat16: ("_keep_in_fp32_modules_strict",),
    }
    return any(getattr(module, name, None) for module in model.modules() for name in names.get(dtype, ()))
