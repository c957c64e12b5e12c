"""Merge adapters into the base that they were trained on, and measure what that costs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from transformers import AutoTokenizer

from halfbyte import adapters, files
from halfbyte.errors import Halted, UserError
from halfbyte.export import MERGE_RECORD, compared, measure, merging
from halfbyte.export.compared import MERGED, dtype_name
from halfbyte.export.deltas import Deltas
from halfbyte.export.measure import Measured
from halfbyte.export.origin import Origin, origin_of
from halfbyte.export.published import published
from halfbyte.names import is_local, public
from halfbyte.quantization import stacks_of
from halfbyte.quantization.streamed import own_quantization

# How far a merge may be from the model as trained, as a share of the adapter's effect on the logits. 16 bits round the
# whole weight, so that a small update loses more of itself: the bound is for an update of 4% of the weights' norm.
_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
_SMALL = 0.04


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is merged and how; spelt as on the command line."""

    adapters: Sequence[Path]
    output_dir: Path
    weights: Sequence[float] | None = None
    combination_type: str = "cat"
    into: str = "trained"
    dtype: torch.dtype | None = None
    data: str | None = None
    recipe: str | None = None
    model: str | None = None
    measure: str = "all"
    max_shard_size: int = 5 * 10**9
    force: bool = False


@dataclass
class Result:
    """What was written, and how each way to use the adapter scores on ``source``; ``bound`` is the merge's."""

    written: merging.Merged
    dtype: torch.dtype
    bound: float
    source: str = ""
    measured: dict[str, Measured] = field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """Whether the merge is within its bound, as far as it was measured."""
        error = self.measured[MERGED].error if MERGED in self.measured else None
        return error is None or error <= self.bound

    def lines(self) -> list[str]:
        """What to print of it."""
        found = [
            f"update: {self.written.update:.2%} of the weights' norm; the cast to {dtype_name(self.dtype)} changes "
            f"{self.written.rounding:.2%} of it"
        ]
        if self.measured:
            found += [f"measured on {self.source}:", *(f"  {line}" for line in measure.table(self.measured))]
        return found


def merge(options: Options) -> Result:
    """Write ``options.output_dir``: a model that plain transformers loads, with neither PEFT nor bitsandbytes.

    Raises :class:`UserError` for adapters that do not fit each other or their base, and :class:`Halted` for a merge
    that is further from the model as trained than its bound: nothing is kept then, unless forced.
    """
    origin = _common_origin(options)
    dtype = options.dtype or (origin.dtype if origin.dtype == torch.float16 else torch.bfloat16)
    tokenizer = _tokenizer(options.adapters[-1], origin)
    plain = merging.skeleton(origin, dtype)
    deltas = Deltas(options.adapters, options.weights, options.combination_type, stacks_of(plain))
    with published(options.output_dir, merging.bytes_of(plain)) as directory:
        written = merging.write(
            origin,
            deltas,
            plain,
            directory,
            most=options.max_shard_size,
            tokenizer=tokenizer,
            into_original=options.into == "original",
        )
        tokenizer.save_pretrained(directory)
        result = Result(written, dtype, _BOUNDS[dtype] * max(1.0, _SMALL / (written.update or math.inf)))
        if options.measure != "none" and not deltas.combines:
            result.source, result.measured = compared.measure_all(
                origin,
                options.adapters[0],
                directory,
                tokenizer,
                alternatives=options.measure == "all",
                data=options.data,
                recipe=options.recipe,
            )
        if not result.is_sound and not options.force:
            raise Halted("\n".join([_unsound(result), *result.lines()]))
        _record(result, options, origin, directory)
    return result


def _common_origin(options: Options) -> Origin:
    """The one base of all adapters. Raises :class:`UserError` for several, and for an adapter on its own ancestor."""
    origins = [origin_of(path, model=options.model) for path in options.adapters]
    first = origins[0]
    for path, other in zip(options.adapters[1:], origins[1:], strict=True):
        one, two = (
            (each.directory.resolve(), each.task, each.quantization is None) for each in (first, other)
        )
        if one != two:
            raise UserError(
                f"{path} was trained on {other.name}, and {options.adapters[0]} on {first.name}; adapters of one base "
                "are merged"
            )
    if options.weights is not None and len(options.weights) != len(options.adapters):
        raise UserError(
            f"{len(options.weights)} weights for {len(options.adapters)} adapters; write one for each",
            option="--weights",
        )
    chains = [adapters.chain(str(path), str(path)) for path in options.adapters]
    for path, chain in zip(options.adapters, chains, strict=True):
        before = {entry["adapter_sha256"] for entry in chain[:-1]}
        for ancestor, its in zip(options.adapters, chains, strict=True):
            if its and its[-1]["adapter_sha256"] in before - {None}:
                raise UserError(f"{path} was trained from {ancestor} and contains it; merge {path} alone")
    if options.into == "original" and own_quantization(first.directory) is not None:
        raise UserError(f"{first.name} is quantized, and not the original of 16 bits", option="--into")
    return first


def _tokenizer(adapter: Path, origin: Origin) -> Any:
    own = (adapter / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(adapter if own else origin.directory)


def _unsound(result: Result) -> str:
    error = result.measured[MERGED].error or math.nan
    return (
        f"the merge differs from the model as trained by {error:.2%} of the adapter's effect, more than "
        f"{result.bound:.2%}; nothing is kept (`--dtype float32` is exact, `--force` keeps it)"
    )


def _record(result: Result, options: Options, origin: Origin, directory: Path) -> None:
    """Write merge.json and the model card."""
    weights = options.weights or [1.0] * len(options.adapters)
    chain = [adapters.chain(str(path), path.name) for path in options.adapters]
    content = {
        "format": 1,
        "adapters": [
            {"name": path.name, "weight": weight, "lineage": runs}
            for path, weight, runs in zip(options.adapters, weights, chain, strict=True)
        ],
        "combination_type": options.combination_type if len(options.adapters) > 1 else None,
        "base": {"name": origin.name, "revision": origin.revision},
        "into": options.into,
        "dtype": dtype_name(result.dtype),
        "update": result.written.update,
        "rounding": result.written.rounding,
        "untied": result.written.untied,
        "bound": result.bound,
        "measured_on": result.source or None,
        "measured": {name: each.as_dict() for name, each in result.measured.items()},
        "versions": {
            name: version(name) for name in ("halfbyte", "torch", "transformers", "peft", "bitsandbytes")
        },
    }
    (directory / "README.md").write_text(_card(result, options, origin), encoding="utf-8")
    listing = {path.name: files.entry(path, durable=True) for path in sorted(directory.iterdir())}
    text = json.dumps({**content, "files": listing}, indent=2)
    files.write_file(directory / MERGE_RECORD, f"{text}\n".encode())


def _card(result: Result, options: Options, origin: Origin) -> str:
    base = None if is_local(origin.name) else origin.name
    data = ModelCardData(base_model=base, library_name="transformers", tags=["halfbyte", "merged"])
    merged = ", ".join(f"`{path.name}`" for path in options.adapters)
    how = "the 16-bit base" if options.into == "original" else "the base as it was trained on, dequantized"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {options.output_dir.name}",
        f"`{public(origin.name)}` with {merged} merged into {how}, in "
        f"{dtype_name(result.dtype)}, by halfbyte. `{MERGE_RECORD}` has the details.",
        "```\n" + "\n".join(result.lines()) + "\n```",
        f"```python\nfrom transformers import AutoTokenizer, {origin.auto_class}\n\n"
        f'model = {origin.auto_class}.from_pretrained(".", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```',
    ]
    return "\n\n".join(parts) + "\n"
