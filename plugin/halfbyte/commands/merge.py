"""``halfbyte merge ADAPTER... --output_dir DIR``: a model that plain transformers loads, and what the merge costs."""

from pathlib import Path

from halfbyte.commands.parser import Parser
from halfbyte.terminal import passes
from halfbyte.terminal.wording import say

_DTYPES = ("float32", "bfloat16", "float16")
_COMBINATIONS = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Merge and measure; return 0. Raises as :func:`halfbyte.export.merge.merge` does."""
    parser = Parser("merge")
    parser.add_argument(
        "adapters", nargs="+", type=Path, metavar="ADAPTER", help="a run, a checkpoint, or an adapter"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="the directory to write, which must be new"
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, help="a weight for each of several adapters; unset: 1"
    )
    parser.add_argument(
        "--combination_type",
        choices=_COMBINATIONS,
        default="cat",
        help="how PEFT combines several; cat: their sum",
    )
    parser.add_argument(
        "--into", choices=("trained", "original"), default="trained",
        help="the base as it was trained on, dequantized, or its 16-bit original",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of the weights; unset: bfloat16, or the run's float16"
    )
    parser.add_argument("--data", help="rows to measure on; unset: those that the run evaluated on")
    parser.add_argument("--recipe", help="the recipe that reads --data, of an adapter without a run.json")
    parser.add_argument("--model_name_or_path", help="where the base is, if not where it was")
    parser.add_argument(
        "--measure", choices=("all", "merge", "none"), default="all",
        help="compare the alternatives too, the merge alone, or nothing",
    )  # fmt: skip
    parser.add_argument("--max_shard_size", default="5GB", help="bytes of one file")
    parser.add_argument("--force", action="store_true", help="keep a merge beyond its bound")
    given = parser.parse(arguments)

    import torch

    from halfbyte.export.allocator import return_freed_memory
    from halfbyte.export.merge import Options, merge
    from halfbyte.export.shards import most_bytes

    most = most_bytes(given.max_shard_size)
    return_freed_memory()
    with passes.shown(bar=True):
        result = merge(
            Options(
                adapters=given.adapters,
                output_dir=given.output_dir,
                weights=given.weights,
                combination_type=given.combination_type,
                into=given.into,
                dtype=None if given.dtype is None else getattr(torch, given.dtype),
                data=given.data,
                recipe=given.recipe,
                model=given.model_name_or_path,
                measure=given.measure,
                max_shard_size=most,
                force=given.force,
            )
        )
    say(*result.lines(), f"merged: {given.output_dir}", f"next: vllm serve {given.output_dir}")
    return 0
