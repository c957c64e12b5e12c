"""``halfbyte quantize MODEL --output_dir DIR``: the pre-quantized checkpoint of a 16-bit one, or of one in MXFP4."""

from pathlib import Path

from halfbyte.commands.parser import Parser
from halfbyte.terminal import passes
from halfbyte.terminal.wording import say


def main(arguments: list[str]) -> int:
    """Quantize and return 0. Raises :class:`UserError` as :func:`halfbyte.export.quantize.quantize` does."""
    parser = Parser("quantize")
    parser.add_argument("model", metavar="MODEL", help="a hub id or a directory, in 16 or 32 bits or MXFP4")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="the directory to write, which must be new"
    )
    parser.add_argument("--model_revision", default="main", help="a branch, tag or commit")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
                        help="of what stays as it is, and of computation")  # fmt: skip
    parser.add_argument(
        "--bnb_4bit_quant_type", choices=("nf4", "fp4"), default="nf4", help="the 4-bit data type"
    )
    parser.add_argument(
        "--no_double_quant", action="store_true", help="keep the quantization constants in 32 bits"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="bytes of one file")
    given = parser.parse(arguments)

    import torch

    from halfbyte.export.allocator import return_freed_memory
    from halfbyte.export.quantize import quantize
    from halfbyte.export.shards import most_bytes

    most = most_bytes(given.max_shard_size)
    return_freed_memory()
    with passes.shown(bar=True):
        found = quantize(
            given.model,
            given.output_dir,
            revision=given.model_revision,
            dtype=getattr(torch, given.dtype),
            quant_type=given.bnb_4bit_quant_type,
            double=not given.no_double_quant,
            most=most,
        )
    written, *notes = found.lines()
    say(
        f"quantized: {given.output_dir}, {written}",
        *notes,
        f"next: halfbyte RECIPE --model_name_or_path {given.output_dir}; `halfbyte recipes` lists them",
    )
    return 0
