"""What each quantization scheme costs on a model's weights, and with rows on its loss: a table and a page of plots."""

import csv
import io
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from halfbyte.errors import UserError
from halfbyte.export import held_out, measure, schemes
from halfbyte.export.findings import PLAIN, Layer, Report
from halfbyte.export.held_out import HeldOut
from halfbyte.export.page import picture
from halfbyte.export.schemes import COMPARED, SIZES, Scheme
from halfbyte.files import replace_file
from halfbyte.quantization import streamed
from halfbyte.quantization.skeleton import without_weights
from halfbyte.task import CAUSAL_LM
from halfbyte.terminal.passes import Pass

DRIFT = (1, 10, 100)
_DRIFTING = 1 << 20  # weights that drift is measured on, of the middle layer
_HISTOGRAM = torch.linspace(-1, 1, 201)
_PACKED = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def report(
    name: str, output: Path, *, revision: str = "main", data: str | None = None, recipe: str | None = None
) -> Report:
    """Compare all schemes on the weights of ``name``, with ``data`` on its loss too, and write the files to ``output``.

    The weights of a model in MXFP4 are those that it stands for. Raises :class:`UserError` for a model that is not
    there or is quantized otherwise, and for rows that ``recipe`` cannot read.
    """
    directory = streamed.unquantized(name, revision, _PACKED)
    if data is not None and streamed.own_quantization(directory) is not None:
        raise UserError(
            f"{name!r} is in MXFP4, and rows are scored by a model in 32 bits; without rows its weights are compared",
            option="--data",
        )
    every = (*COMPARED, *SIZES)
    found = _weights(name, directory, every)
    if data is not None:
        found.source, found.losses = _losses(directory, data, recipe, every)
    output.mkdir(parents=True, exist_ok=True)
    _write(found, output)
    return found


@torch.no_grad()
def _weights(name: str, directory: Path, every: Sequence[Scheme]) -> Report:
    """Apply every scheme to each weight that would be quantized, one weight in memory at a time."""
    layers: list[Layer] = []
    sizes = dict.fromkeys((scheme.name for scheme in every), 0)
    histogram = torch.zeros(len(_HISTOGRAM) - 1)
    drift: dict[int, float] = {}
    packed = packed_names(directory)
    middle = packed[len(packed) // 2]
    with Pass("comparing", len(packed), unit="weights", summed_up=False) as progress:
        for key, weight in _each(directory, set(packed)):
            errors = {}
            for scheme in every:
                applied, size = scheme.apply(weight)
                errors[scheme.name] = (applied - weight).square().sum().item()
                sizes[scheme.name] += size
            layers.append(Layer(key, weight.numel(), weight.square().sum().item(), errors))
            histogram += _histogram(weight)
            if key == middle:
                rows = weight.flatten(0, -2)  # of all experts, where the weight is a stack of them
                drift = schemes.drift(rows[: max(1, _DRIFTING // rows.shape[1])], DRIFT)
            progress.advance(1)
    total = sum(each.weights for each in layers)
    bits = {scheme.name: (scheme.bits, 8 * sizes[scheme.name] / total) for scheme in every}
    return Report(name, layers, bits, histogram / histogram.sum(), drift)


def packed_names(directory: Path) -> list[str]:
    """The weights that a 4-bit base has packed."""
    model = without_weights(directory, quantization=_PACKED, dtype=torch.float32, task=CAUSAL_LM)
    return [name for name, weight in model.named_parameters() if hasattr(weight, "quant_type")]


def _each(directory: Path, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    source = streamed.read(directory, quantization=None, dtype=torch.float32, task=CAUSAL_LM)
    for name, parts in source.parameters():
        if name in wanted:
            yield name, parts[""].float()


def _histogram(weight: Tensor) -> Tensor:
    """How often values occur, each over the largest magnitude of its block: what NF4 has its levels for."""
    flat = weight.reshape(-1)
    blocks = flat[: flat.numel() // schemes.BLOCK * schemes.BLOCK].view(-1, schemes.BLOCK)
    scaled = blocks / blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.histogram(scaled.reshape(-1), bins=_HISTOGRAM).hist


def _losses(
    directory: Path, data: str, recipe: str | None, every: Sequence[Scheme]
) -> tuple[str, dict[str, Tensor]]:
    with tempfile.TemporaryDirectory(prefix="halfbyte-report-") as scratch:
        rows, model = held_out.rows_at(data, recipe, directory, Path(scratch))
    return rows.source, losses(model, packed_names(directory), rows, every)


@torch.no_grad()
def losses(model: Any, packed: Sequence[str], rows: HeldOut, every: Sequence[Scheme]) -> dict[str, Tensor]:
    """What :func:`measure.losses` says of ``model`` as it is, and with its ``packed`` weights under each scheme.

    The weights are left under the last one.
    """
    weights = {name: model.get_parameter(name) for name in packed}
    kept = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    found = {PLAIN: measure.losses(model, rows, PLAIN)}
    for scheme in every:
        for name, weight in weights.items():
            weight.data.copy_(scheme.apply(kept[name])[0])
        found[scheme.name] = measure.losses(model, rows, scheme.name)
    return found


def _write(found: Report, output: Path) -> None:
    """report.csv, layers.csv and report.png."""
    replace_file(output / "report.csv", _csv([found.columns(), *found.rows()]))
    names = list(found.bits)
    layers = [
        (each.name, each.weights, *(math.sqrt(each.errors[name] / (each.norm or 1.0)) for name in names))
        for each in found.layers
    ]
    replace_file(output / "layers.csv", _csv([("weight", "parameters", *names), *layers]))
    replace_file(output / "report.png", picture(found))


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
