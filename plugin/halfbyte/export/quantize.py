"""A checkpoint in four bits, written parameter by parameter: the bytes that training would load."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig

from halfbyte.export.merging import bytes_of, write_configuration
from halfbyte.export.published import published
from halfbyte.export.shards import Shards
from halfbyte.multimodal import other_parts
from halfbyte.quantization import packed, quantizer, streamed
from halfbyte.quantization.skeleton import without_weights
from halfbyte.task import CAUSAL_LM
from halfbyte.terminal.passes import Pass


@dataclass(frozen=True)
class Quantized:
    """What was written: its bytes and parameters, and those of the layers in four bits alone.

    ``own`` is how the checkpoint was quantized before; ``unread`` is what of it plain transformers cannot load.
    """

    total: int
    parameters: int
    packed_bytes: int
    packed_parameters: int
    own: str | None = None
    unread: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What was written, in a line, and who can load it where that is not everybody."""
        bits = 8 * self.packed_bytes / max(self.packed_parameters, 1)
        before = "" if self.own is None else f"; {self.own.upper()} was dequantized a parameter at a time"
        found = [
            f"{self.total / 1e6:,.1f} MB, {8 * self.total / self.parameters:.2f} bits a parameter; "
            f"{self.packed_parameters / self.parameters:.1%} of them in {bits:.3f} bits{before}"
        ]
        if self.unread:
            found.append(
                f"it loads with halfbyte only: plain transformers does not read {' and '.join(self.unread)} in 4 bits"
            )
        return found


def quantize(
    name: str,
    output: Path,
    *,
    revision: str = "main",
    dtype: torch.dtype = torch.bfloat16,
    quant_type: str = "nf4",
    double: bool = True,
    most: int = 5 * 10**9,
) -> Quantized:
    """Write the base ``name`` in four bits to the new directory ``output``, the rest of it in ``dtype``.

    Of a multimodal checkpoint the other parts are written as they are, and what is in MXFP4 is dequantized first. It
    trains here as the checkpoint does with the same options, and in plain TRL unless something is ``unread``. Raises
    :class:`UserError` for a checkpoint that is not there, or is quantized otherwise already.
    """
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    directory = streamed.unquantized(name, revision, settings)
    plain = without_weights(directory, quantization=None, dtype=dtype, task=CAUSAL_LM)
    if parts := other_parts(plain):  # loading the whole checkpoint requires the names of what is in 16 bits
        settings.llm_int8_skip_modules = ["lm_head", *parts]
    with published(output, bytes_of(plain) // 2) as aside:
        source = streamed.read(directory, quantization=settings, dtype=dtype, task=CAUSAL_LM)
        shards, counted = Shards(aside, most), [0, 0]
        unread: set[str | None] = set()
        known = {key: weight.numel() for key, weight in plain.state_dict().items()}
        with Pass("quantizing", len(known), unit="tensors", summed_up=False) as progress:
            for key, held in source.parameters():
                if key in plain.all_tied_weights_keys:
                    continue
                stored = source.stored_as(key)
                shards.add({f"{stored}{suffix}": tensor for suffix, tensor in held.items()})
                if packed.is_packed(held):
                    counted[0] += sum(part.numel() * part.element_size() for part in held.values())
                    counted[1] += known[key]
                    path, _, leaf = key.rpartition(".")
                    unread.add(quantizer.unread_by_transformers(plain.get_submodule(path), leaf))
                progress.advance(1)
        for key, tensor in source.beside():
            shards.add({key: tensor})
            known[key] = tensor.numel()
        shards.finish()
        write_configuration(source.model, directory, aside)
        AutoTokenizer.from_pretrained(directory).save_pretrained(aside)
    tied = sum(known[key] for key in plain.all_tied_weights_keys)
    own = streamed.own_quantization(directory)
    return Quantized(
        total=shards.total,
        parameters=sum(known.values()) - tied,
        packed_bytes=counted[0],
        packed_parameters=counted[1],
        own=None if own is None else str(own["quant_method"]),
        unread=tuple(sorted(filter(None, unread))),
    )
