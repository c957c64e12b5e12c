"""Ways to merge an adapter, side by side: `python -m tests.benchmarks.merges RUN...`.

Each is held against the model as its run trained it, on the rows that the run evaluated on: `halfbyte merge`, PEFT's
`merge_and_unload` on the 4-bit base, a merge into a base whose every matrix went through NF4 and back, embedding and
head too, as axolotl does (bitsandbytes issue 2067 shows its call), and a merge into the 16-bit base. All weights are
stored in bfloat16, and compute in float32.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.export import compared, held_out, measure, merging, schemes
from halfbyte.export.deltas import Deltas
from halfbyte.export.measure import Measured
from halfbyte.export.origin import Origin, origin_of
from halfbyte.quantization import compute_in_float32

MOST = 5 * 10**9


def ours(origin: Origin, adapter: Path, scratch: Path) -> Any:
    """What `halfbyte merge` writes."""
    output = scratch / "merged"
    output.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    plain = merging.skeleton(origin, torch.bfloat16)
    merging.write(origin, Deltas([adapter]), plain, output, most=MOST, tokenizer=tokenizer)
    return AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)


def into_four_bits(origin: Origin, adapter: Path, scratch: Path) -> Any:
    """PEFT's merge_and_unload on the base in four bits, which quantizes each sum again."""
    _, model = compared.load_as_trained(origin, adapter, AutoTokenizer.from_pretrained(adapter))
    merged = model.merge_and_unload()
    compute_in_float32(merged)
    return merged


def round_trip(origin: Origin, adapter: Path, scratch: Path) -> Any:
    """Every matrix of the base through NF4 with double quantization and back, then the update."""
    base = AutoModelForCausalLM.from_pretrained(origin.directory, dtype=torch.float32)
    with torch.no_grad():
        for weight in base.parameters():
            if weight.dim() == 2:
                weight.copy_(schemes.NF4.apply(weight.detach())[0])
    return _stored(PeftModel.from_pretrained(base, adapter).merge_and_unload())


def into_original(origin: Origin, adapter: Path, scratch: Path) -> Any:
    """The update on the weights that nothing was trained on."""
    base = AutoModelForCausalLM.from_pretrained(origin.directory, dtype=torch.float32)
    return _stored(PeftModel.from_pretrained(base, adapter).merge_and_unload())


def _stored(model: Any) -> Any:
    return model.bfloat16().float()


WAYS: dict[str, Callable[[Origin, Path, Path], Any]] = {
    "halfbyte merge": ours,
    "merge_and_unload on the 4-bit base": into_four_bits,
    "every matrix through NF4 and back": round_trip,
    "into the 16-bit base": into_original,
}


def compare(adapter: Path) -> tuple[str, dict[str, Measured]]:
    """On what, and the figures of each way."""
    origin = origin_of(adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    with scratch() as directory:
        plugin, trained = compared.load_as_trained(origin, adapter, tokenizer)
        rows = held_out.rows_of(origin, plugin, trained, tokenizer, directory)
        assert rows is not None, f"{adapter} has evaluated on nothing"
        reference, scored = measure.as_trained(trained, rows, directory, scorer=False)
        found = {compared.TRAINED: scored}
        for name, way in WAYS.items():
            found[name] = measure.compare(way(origin, adapter, directory), reference, name)
        return rows.source, found


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    for run in parser.parse_args().runs:
        source, found = compare(run)
        print(f"{run.name}, on {source}", *measure.table(found), sep="\n", flush=True)


if __name__ == "__main__":
    main()
