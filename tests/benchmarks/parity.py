"""Whether four bits cost what the QLoRA paper says: `python -m tests.benchmarks.parity [--model DIR ...] [--write]`.

The order of its Table 2 on bases that are trained here, by the means of the demo, and on any model that is given; and
QLoRA beside LoRA on the 16-bit base and full fine-tuning, on the demo's base and rows. See
:mod:`tests.benchmarks.scheme_order` and :mod:`tests.benchmarks.methods`.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from halfbyte.demo import corpus, stages
from tests.benchmarks import machine, methods, results, scheme_order
from tests.benchmarks.demo_bases import BASES, trained


def order(models: Sequence[str], directory: Path) -> list[str]:
    """The table of schemes, on the demo's texts that no base was trained on."""
    source = corpus.collect()
    texts = [text.text for text in source.texts if corpus.held_out(text.module)]
    places = {base.name: trained(base, source, directory) for base in BASES}
    places |= {Path(model).name: Path(model) for model in models}
    return scheme_order.table({name: scheme_order.losses(place, texts) for name, place in places.items()})


def compared(directory: Path) -> list[str]:
    """The table of ways to fine-tune the demo's base on its SFT rows."""
    base = trained(BASES[0], corpus.collect(), directory)
    with tempfile.TemporaryDirectory() as scratch:
        found = methods.compare(base, base.parent / "data" / "sft", Path(scratch), size=stages.Size())
    return methods.table(*found)


def main() -> None:
    """Measure and print; with --write, into RESULTS.md too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="a model's directory, in 16 or 32 bits")
    parser.add_argument("--only", choices=("order", "methods"))
    parser.add_argument("--directory", type=Path, help="keep the bases here, and use those that are")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with nullcontext(options.directory) if options.directory else tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if options.only != "methods":
            _show(results.SCHEMES, order(options.model, directory), options.write)
        if options.only != "order":
            _show(results.METHODS, compared(directory), options.write)


def _show(heading: str, table: Sequence[str], write: bool) -> None:
    about = machine.run("parity", sys.argv[1:], f"threads {torch.get_num_threads()}")
    section = "\n".join([heading, "", about, "", *table])
    print(section, flush=True)
    if write:
        results.write(section)


if __name__ == "__main__":
    main()
