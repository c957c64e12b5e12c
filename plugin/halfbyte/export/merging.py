"""A base with adapters merged into it, written parameter by parameter: dequantized, merged in float32, cast once."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import UserError
from halfbyte.export.deltas import Deltas
from halfbyte.export.origin import Origin
from halfbyte.export.shards import Shards
from halfbyte.quantization import packed, stacks_of, streamed
from halfbyte.quantization.skeleton import without_weights
from halfbyte.task import SEQUENCE_CLASSIFICATION
from halfbyte.terminal.passes import Pass


@dataclass(frozen=True)
class Merged:
    """What was written: the files with weights, their bytes, whether a tied head is untied, and what was lost.

    ``update`` is the norm of what the adapters add over that of the weights they add to; ``rounding`` the norm of what
    the cast changed over that of the update.
    """

    files: list[str]
    total: int
    untied: bool
    update: float
    rounding: float


@dataclass
class _Norms:
    """Squared norms over all weights that the adapters change."""

    weights: float = 0.0
    update: float = 0.0
    rounding: float = 0.0

    def add(self, before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
        self.weights += before.square().sum().item()
        self.update += (after - before).square().sum().item()
        self.rounding += (after.to(dtype).float() - after).square().sum().item()


def skeleton(origin: Origin, dtype: torch.dtype) -> PreTrainedModel:
    """The merged model without its weights."""
    return without_weights(origin.directory, quantization=None, dtype=dtype, task=origin.task)


def bytes_of(model: PreTrainedModel) -> int:
    """The bytes of the weights of ``model``."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def write(
    origin: Origin,
    deltas: Deltas,
    plain: PreTrainedModel,
    directory: Path,
    *,
    most: int,
    tokenizer: Any,
    into_original: bool = False,
) -> Merged:
    """Write the base of ``origin`` with ``deltas`` merged into ``directory``, in files of ``most`` bytes.

    ``plain`` is its :func:`skeleton`, in the dtype to write. The weights are those of training, dequantized from four
    bits to float32, or with ``into_original`` the checkpoint's own. An embedding of fewer rows than ``tokenizer`` has
    tokens grows, as it did for training. Of a multimodal checkpoint the other parts are written
    as they are. Raises :class:`UserError` where a tensor of an adapter fits nothing.
    """
    dtype = plain.dtype
    source = streamed.read(
        origin.directory,
        quantization=None if into_original else origin.quantization,
        dtype=torch.float32 if into_original else origin.dtype,
        task=origin.task,
        new=[name for name in plain.state_dict() if deltas.of(name)],
    )
    shards, untied, norms, stacks = Shards(directory, most), False, _Norms(), stacks_of(plain)
    for name, tensor in _merged(source, plain, deltas, len(tokenizer), norms):
        stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
        made = {source.stored_as(name): stored}
        # Experts are published a matrix each; transformers loads both.
        shards.add(revert_weight_conversion(plain, made) if name in stacks else made)
        untied |= name in plain.all_tied_weights_keys
    if deltas.unused:
        raise UserError(f"{deltas.unused[0]}: nothing in the base {origin.name} has this name")
    for name, tensor in source.beside():
        shards.add({name: tensor})
    files = shards.finish()
    _configure(plain, directory, origin, tokenizer, untied)
    update, lost = (math.sqrt(each) for each in (norms.update, norms.rounding))
    return Merged(
        files,
        shards.total,
        untied,
        update / (math.sqrt(norms.weights) or 1.0),
        lost / update if update else 0.0,
    )


def _merged(
    source: streamed.Streamed | streamed.Whole,
    plain: PreTrainedModel,
    deltas: Deltas,
    vocabulary: int,
    norms: _Norms,
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of the merged model; a head tied to the embedding only where an adapter parts the two."""
    tied: dict[str, str] = dict(plain.all_tied_weights_keys)
    embeddings = _names_of(plain, (plain.get_input_embeddings(), plain.get_output_embeddings()))
    parting = {head: whole for head, whole in tied.items() if deltas.part(head, whole)}
    for head in tied.keys() - parting:
        deltas.take(head)
    known = plain.state_dict()

    def merged(name: str, weight: Tensor) -> Tensor:
        if not deltas.of(name):
            return weight
        after = deltas.apply(name, weight, plain.get_submodule(name.rpartition(".")[0]))
        if name not in embeddings:
            norms.add(weight, after, plain.dtype)
        return after

    with Pass("merging", len(known), unit="tensors", summed_up=False) as progress:
        for name, parts in source.parameters():
            if name in tied:
                continue
            weight = _plain(parts, plain.get_submodule(name.rpartition(".")[0]))
            if name in embeddings:
                weight = _grown(weight, vocabulary)
            for head in (head for head, whole in parting.items() if whole == name):
                yield head, merged(head, weight)
            yield name, merged(name, weight)
            progress.advance(1)
        for name in known:  # a new head, which the base's files do not have
            if name not in tied and deltas.of(name):  # what the base has is taken by now
                yield name, deltas.apply(name, torch.zeros(known[name].shape), plain)


def _plain(parts: streamed.Parts, module: nn.Module) -> Tensor:
    """A parameter of ``module`` in float32, where it has fractions."""
    if not packed.is_packed(parts):
        value = parts[""]
        return value.float() if value.is_floating_point() else value
    weight = packed.unpack(parts)
    return weight.T if isinstance(module, Conv1D) else weight  # packed weights are [out, in] for any layer


def _grown(weight: Tensor, rows: int) -> Tensor:
    """``weight`` with at least ``rows`` rows; new ones are zero until an adapter has them."""
    missing = rows - len(weight)
    return torch.cat([weight, weight.new_zeros(missing, weight.shape[1])]) if missing > 0 else weight


def _names_of(model: nn.Module, modules: tuple[nn.Module | None, ...]) -> set[str]:
    wanted = {id(module) for module in modules if module is not None}
    return {f"{name}.weight" for name, module in model.named_modules() if id(module) in wanted}


def _configure(plain: PreTrainedModel, directory: Path, origin: Origin, tokenizer: Any, untied: bool) -> None:
    config = plain.config
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    if origin.task == SEQUENCE_CLASSIFICATION:  # a sequence is scored at its last token before the padding
        text.pad_token_id = tokenizer.pad_token_id
    if untied:
        config.tie_word_embeddings = text.tie_word_embeddings = False
    write_configuration(plain, origin.directory, directory)


def write_configuration(model: PreTrainedModel, source: Path, directory: Path) -> None:
    """Write the configuration of ``model`` to ``directory``, and that of generation as ``source`` has it."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    for processor in sorted(source.glob("*processor_config.json")):  # of a multimodal model
        shutil.copyfile(processor, directory / processor.name)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(directory)
