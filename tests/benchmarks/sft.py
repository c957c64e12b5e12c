"""Measure SFT steps against plain TRL: `python -m tests.benchmarks.sft [--quick] [--bf16] [--write]`.

All variants of a case live in one process and take their steps in turn, on the same rows, so that a busy
machine slows all of them. On CPU the clock is the process's CPU time on one thread. Peak memory is measured
apart, with one process for each variant.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from tests.benchmarks import machine, report, variants, workload
from tests.benchmarks.variants import Step, Stepper, Variant
from tests.benchmarks.workload import CASES, Case

WARM_UP = 2
REPEATS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the two threshold cases, without the grid")
    parser.add_argument(
        "--bf16", action="store_true", help="TRL's bfloat16 columns too; slow where it is not native"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--case", help="only the case of this name")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md beside this file")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    cache = Path(tempfile.gettempdir()) / "halfbyte-benchmarks"
    cache.mkdir(exist_ok=True)
    if options.memory:
        print(json.dumps(peak_memory(find(options.memory[0]), options.memory[1], cache)))
        return
    cases = [
        case
        for case in CASES
        if case.name == options.case or (not options.case and (case.threshold or not options.quick))
    ]
    results = []
    for case in cases:
        chosen, rates = columns(case, options), {}
        if case.threshold and not options.quick:
            rates = try_out(case, variants.grid(case), cache)
            best = next(v for v in variants.grid(case) if v.name == max(rates, key=rates.__getitem__))
            chosen += [best] if best.name not in {variant.name for variant in chosen} else []
        lines = measure(case, chosen, options.repeats, cache)
        results.append(report.Result(case, lines, rates, max(rates, key=rates.__getitem__, default=None)))
        print(report.table(results[-1]), flush=True)
        if options.write:  # after each case: a run that is cut short leaves what it has measured
            how = "--quick" if options.quick else "in full"
            text = report.page(results, machine.facts(), how, options.repeats)
            (Path(__file__).parent / "RESULTS.md").write_text(text, encoding="utf-8")


def columns(case: Case, options: argparse.Namespace) -> list[Variant]:
    """TRL in the dtype that is fast here, first; halfbyte in it; then the others that were asked for."""
    fast_dtype = variants.native_dtype()
    found = [variants.reference(fast_dtype), variants.halfbyte(fast_dtype)]
    if case.threshold:
        found.append(variants.halfbyte(fast_dtype, "min"))
    if options.bf16 or fast_dtype == "bfloat16":
        others = (variants.reference("bfloat16"), variants.halfbyte("bfloat16"), variants.TRL_DEFAULTS)
        found += [variant for variant in others if variant not in found]
    return found


def try_out(case: Case, candidates: list[Variant], cache: Path) -> dict[str, float]:
    """Real tokens a second of each candidate: the median of three steps, in turn, after one to warm up."""
    with tempfile.TemporaryDirectory() as output:
        steppers = start(case, candidates, 4, cache, output)
        turns = [[stepper.step() for stepper in steppers] for _ in range(4)]
    steps = zip(*turns[1:], strict=True)
    rates = [statistics.median(step.tokens / step.seconds for step in taken) for taken in steps]
    return dict(zip((variant.name for variant in candidates), rates, strict=True))


def start(case: Case, columns: list[Variant], steps: int, cache: Path, output: str) -> list[Stepper]:
    """A stepper for each variant, over rows for ``steps`` steps."""
    checkpoint = workload.checkpoint(case, cache)
    # Packed, twice the rows fill as many batches.
    rows = [workload.rows(case, steps * (2 if "packing" in v.options else 1)) for v in columns]
    return [Stepper(v, case, checkpoint, r, Path(output)) for v, r in zip(columns, rows, strict=True)]


def measure(case: Case, columns: list[Variant], repeats: int, cache: Path) -> list[report.Line]:
    """Interleave the steps of all variants; the first is what the others are compared with."""
    with tempfile.TemporaryDirectory() as output:
        steppers = start(case, columns, WARM_UP + repeats, cache, output)
        taken: list[list[Step]] = [[] for _ in columns]
        gradients: list[dict[str, torch.Tensor]] = []
        for turn in range(WARM_UP + repeats):
            for i, stepper in enumerate(steppers):
                taken[i].append(stepper.step())
                if turn == 0:
                    gradients.append({name: g.float().clone() for name, g in stepper.gradients.items()})
                stepper.gradients = {}
    lines = []
    for variant, stepper, steps, found in zip(columns, steppers, taken, gradients, strict=True):
        same = [step.tokens for step in steps] == [step.tokens for step in taken[0]]
        pairs = zip(taken[0], steps, strict=True)
        lines.append(
            report.Line(
                variant=variant.name,
                steps=steps[WARM_UP:],
                loss_difference=max(abs(a.loss - b.loss) for a, b in pairs) if same else None,
                gradient_difference=relative_difference(found, gradients[0]) if same else None,
                memory=child_memory(case, variant),
                path=getattr(stepper, "path", ""),
            )
        )
    return lines


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all adapter gradients over the norm of the second."""
    square = sum((a[name].double() - b[name].double()).square().sum().item() for name in b)
    return (square / sum(g.double().square().sum().item() for g in b.values())) ** 0.5


def child_memory(case: Case, variant: Variant) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.sft", "--memory", case.name, variant.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_memory(case: Case, name: str, cache: Path) -> float:
    """MiB that two steps need beyond what is held before them."""
    variant = next(v for v in every_variant(case) if v.name == name)
    rows = workload.rows(case, 6 if "packing" in variant.options else 3)
    # The longest batches first: the peak belongs to them.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    with tempfile.TemporaryDirectory() as output:
        stepper = Stepper(variant, case, workload.checkpoint(case, cache), rows.select(order), Path(output))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            stepper.step()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        before_kib = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again from here
        stepper.step()
        return (_status("VmHWM") - before_kib) / 2**10


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def every_variant(case: Case) -> Iterator[Variant]:
    yield variants.TRL_DEFAULTS
    for dtype in ("float32", "bfloat16"):
        yield variants.halfbyte(dtype)
        yield variants.halfbyte(dtype, "min")
    yield from variants.grid(case)


def find(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


if __name__ == "__main__":
    main()
