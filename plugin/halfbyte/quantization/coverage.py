"""How much of a loaded base is in 4 bits, and what is not."""

from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
from torch import nn
from transformers import PreTrainedModel

from halfbyte import multimodal
from halfbyte.errors import UserError
from halfbyte.quantization.size import count_of, packed_bytes, state_bytes
from halfbyte.task import SEQUENCE_CLASSIFICATION

REQUIRED_SHARE = 0.95
TOWERS = "towers and projectors"


@dataclass(frozen=True)
class Coverage:
    """Bytes of a base, and the share of its matrix-product weights that is in 4 bits.

    ``sixteen_bit_weights`` counts the weights that should be in 4 bits and are not, by parameter;
    ``unquantized_classes`` are the classes of their modules. ``left_out`` counts the bytes of what stays in 16 bits by
    design. ``not_loaded`` are the parts of a multimodal checkpoint that text does not reach, and ``auto_class`` loads
    the whole of it.
    """

    bytes_16bit: int = 0
    bytes_4bit: int = 0
    four_bit_weights: int = 0
    sixteen_bit_weights: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    unquantized_classes: tuple[str, ...] = ()
    not_loaded: tuple[str, ...] = ()
    auto_class: str | None = None

    @property
    def four_bit_share(self) -> float:
        """Weights in 4 bits over all decoder weights used in matrix products; 0 to 1."""
        total = self.four_bit_weights + sum(self.sixteen_bit_weights.values())
        return self.four_bit_weights / total if total else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return what run.json records of the base."""
        whole = (
            {"auto_class": self.auto_class, "not_loaded": list(self.not_loaded)} if self.auto_class else {}
        )
        return {
            "bytes_16bit": self.bytes_16bit,
            "bytes_4bit": self.bytes_4bit,
            "four_bit_share": self.four_bit_share,
            "left_out_bytes": self.left_out,
            **whole,
        }

    def line(self) -> str:
        """Return one line for people: sizes, the share in 4 bits, and what stays in 16 bits by design."""
        left = ", ".join(f"{kind} {_megabytes(size)}" for kind, size in self.left_out.items())
        return (
            f"base: {_megabytes(self.bytes_16bit)} in 16 bits, {_megabytes(self.bytes_4bit)} as loaded; "
            f"{self.four_bit_share:.1%} of its matrix weights in 4 bits, beside them {left}"
        )

    def parts(self) -> list[str]:
        """Return one line on the parts of a multimodal base beside its language model; none of any other."""
        if self.not_loaded:
            return [
                f"base: the language model alone; {', '.join(self.not_loaded)} not loaded, which text does not reach"
            ]
        if (size := self.left_out.get(TOWERS)) is not None:
            return [
                f"base: loaded whole; {TOWERS} frozen, without quantization and adapters, {_megabytes(size)}"
            ]
        return []

    def require(self) -> None:
        """Raise :class:`UserError` if less than 95% of the matrix-product weights is in 4 bits."""
        if self.four_bit_share >= REQUIRED_SHARE:
            return
        largest = sorted(self.sixteen_bit_weights.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} ({weights:,} weights)" for name, weights in largest[:4])
        more = f" and {len(largest) - 4} more" if len(largest) > 4 else ""
        classes = ", ".join(name for name in self.unquantized_classes if name != "Linear")
        reasons = []
        if classes:
            reasons.append(
                f"Linear layers and stacks of experts are quantized, and nothing else: {classes} stay in 16 bits."
            )
        if "Linear" in self.unquantized_classes:
            reasons.append("transformers leaves out nn.Linear that share their weights or stay in 32 bits.")
        raise UserError(
            f"only {self.four_bit_share:.1%} of the decoder's matrix weights is in 4 bits; not quantized: "
            f"{shown}{more}.\n"
            f"{' '.join(reasons)} Use another model, or write `load_in_4bit: false` to train on the unquantized base.",
            option="model_name_or_path",
        )


def measure_coverage(model: PreTrainedModel) -> Coverage:
    """Walk ``model`` once and sort every parameter: 4 bits, 16 bits, or left out by design.

    Left out by design: embeddings, the output head or a classification head, routers, and everything of one
    dimension (norms, biases).
    """
    others = tuple(f"{name}." for name in multimodal.other_parts(model))
    heads = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    seen: set[int] = set()
    in_16_bits = in_4_bits = weights_in_4_bits = 0
    unquantized: dict[str, int] = {}
    left_out: dict[str, int] = {}
    classes: dict[str, None] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(parameter, bnb.nn.Params4bit):
                weights_in_4_bits += count_of(parameter)
                in_16_bits += 2 * count_of(parameter)
                in_4_bits += packed_bytes(parameter) + state_bytes(parameter)
                continue
            in_16_bits += 2 * parameter.numel()
            in_4_bits += parameter.nbytes
            kind = _left_out_kind(
                name, module, parameter, id(module) in heads, model.config.get_text_config()
            )
            if others and f"{name}.".startswith(others):
                kind = TOWERS
            if kind is None:
                unquantized[f"{name}.{leaf}"] = parameter.numel()
                classes[type(module).__name__] = None
            else:
                left_out[kind] = left_out.get(kind, 0) + parameter.nbytes
    return Coverage(
        in_16_bits,
        in_4_bits,
        weights_in_4_bits,
        unquantized,
        left_out,
        tuple(classes),
        not_loaded=tuple(multimodal.left_out(model)),
        auto_class=multimodal.AUTO_CLASS if multimodal.is_multimodal(model.config) else None,
    )


def _left_out_kind(
    name: str, module: nn.Module, parameter: nn.Parameter, is_head: bool, config: object
) -> str | None:
    if isinstance(module, nn.Embedding):
        return "embeddings"
    # A classification head may have linears of its own, as in BART.
    if is_head or not set(SEQUENCE_CLASSIFICATION.unquantized).isdisjoint(name.split(".")):
        return "head"
    experts = {
        getattr(config, field, None) for field in ("num_experts", "num_local_experts", "n_routed_experts")
    }
    if parameter.dim() == 2 and parameter.shape[0] in experts - {None}:
        return "routers"
    return "norms and biases" if parameter.dim() < 2 else None


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
