"""Measure steps against plain TRL: `python -m tests.benchmarks.{sft,dpo} [--quick] [--without-bf16] [--write]`.

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
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
if "--without-bf16" in sys.argv:
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"  # oneDNN reads it once, so it comes before torch

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from tests.benchmarks import machine, report, results, variants, workload
from tests.benchmarks.variants import Step, Stepper, Variant
from tests.benchmarks.workload import CASES, Case

WARM_UP = 2
REPEATS = 9
TRIED = 3  # steps of each of the grid's variants
HOPELESS = 2.5  # times slower than the best: no further steps
CLOSE = (
    1.25  # times slower than the best: measured again beside the others, which three steps cannot tell apart
)
CAPPED = "oneDNN is held to AVX512_CORE, without bfloat16 instructions."


def main(method: str) -> None:
    """Measure the cases of ``method``, ``sft`` or ``dpo``, as the command line asks."""
    options = parse(sys.argv[1:], method)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    cache = Path(tempfile.gettempdir()) / "halfbyte-benchmarks"
    cache.mkdir(exist_ok=True)
    # Neither these bases nor a capped CPU's choice of dtype belong in the user's cache.
    os.environ["XDG_CACHE_HOME"] = str(cache)
    if options.memory:
        print(json.dumps(peak_memory(find(options.memory[0]), options.memory[1], cache)))
    else:
        run(options, sys.argv[1:], cache)


def parse(words: Sequence[str], method: str = "sft") -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="the two threshold cases, without the grid")
    parser.add_argument(
        "--without-bf16",
        action="store_true",
        help="the two threshold cases in float32, with oneDNN's instructions capped below bfloat16's",
    )
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--case", choices=[c.name for c in CASES if c.method == method], help="only this one")
    parser.add_argument("--write", action="store_true", help="put what was measured into RESULTS.md")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    parser.set_defaults(method=method)
    return parser.parse_args(words)


def run(options: argparse.Namespace, words: Sequence[str], cache: Path) -> None:
    """Measure the cases that were asked for, each printed, and written if asked, before the next."""
    short = options.quick or options.without_bf16
    for case in (case for case in CASES if case.method == options.method):
        if options.case not in (None, case.name) or (short and not options.case and not case.threshold):
            continue
        chosen, rates, best = columns(case, options), {}, None
        grid = variants.grid(case) if case.threshold and not short else []
        if grid:
            rates = try_out(case, [variant for variant in grid if variant not in chosen], cache)
            close = max(rates.values()) / CLOSE
            chosen += [variant for variant in grid if rates.get(variant.name, 0.0) >= close]
        lines = measure(case, chosen, options.repeats, cache)
        if grid:  # the options among the columns have been measured there
            names = {variant.name for variant in grid}
            rates |= {line.variant: line.tokens_per_second for line in lines if line.variant in names}
            best = max((x for x in lines if x.variant in names), key=lambda x: x.tokens_per_second).variant
        note = machine.run(options.method, words, f"{options.repeats} steps after {WARM_UP} to warm up")
        suffix, note = (results.EMULATED, f"{note} {CAPPED}") if options.without_bf16 else ("", note)
        text = report.table(report.Result(case, lines, rates, best, suffix, note))
        print(text, flush=True)
        if options.write:
            results.write(text)


def columns(case: Case, options: argparse.Namespace) -> list[Variant]:
    """TRL in the dtype that is fast here, first; halfbyte in it; then what else the full run has time for."""
    fast_dtype = variants.native_dtype()
    # Where experts are computed twice is what most of such a step depends on.
    more = [variants.halfbyte(fast_dtype, "min")] if case.experts else []
    if options.without_bf16:
        return [variants.reference("float32"), variants.halfbyte(fast_dtype), *more]
    found = [variants.reference(fast_dtype), variants.halfbyte(fast_dtype), *more]
    if case.large:
        return found
    found += [variants.reference("bfloat16"), variants.TRL_DEFAULTS]
    if case.method == "dpo":
        found += variants.with_references(fast_dtype)
    if case.threshold and not options.quick:
        found += [variants.halfbyte(fast_dtype, "min"), variants.halfbyte("bfloat16")]
    return [variant for i, variant in enumerate(found) if variant not in found[:i]]


def try_out(case: Case, candidates: list[Variant], cache: Path) -> dict[str, float]:
    """Real tokens a second of each candidate: the median of three steps, in turn, after one to warm up.

    One whose first step is far behind the best of them takes no more, and its name says so.
    """
    with tempfile.TemporaryDirectory() as output:
        steppers = start(case, candidates, 1 + TRIED, cache, output)
        first = [rate(advance(stepper, case, 1, 1 + TRIED)) for stepper in steppers]
        near = [s for s, each in zip(steppers, first, strict=True) if each * HOPELESS >= max(first)]
        turns = [[rate(advance(s, case, 2 + turn, 1 + TRIED)) for s in near] for turn in range(TRIED)]
    found = {
        f"{s.variant.name} (one step)": each for s, each in zip(steppers, first, strict=True) if s not in near
    }
    for stepper, taken in zip(near, zip(*turns, strict=True), strict=True):
        found[stepper.variant.name] = statistics.median(taken)
    return found


def rate(step: Step) -> float:
    return step.tokens / step.seconds


def advance(stepper: Stepper, case: Case, number: int, of: int) -> Step:
    """One step, announced on stderr: a long run shows that it lives."""
    print(f"{case.name}: {stepper.variant.name}: step {number} of {of}", file=sys.stderr, flush=True)
    return stepper.step()


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
                taken[i].append(advance(stepper, case, 1 + turn, WARM_UP + repeats))
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
    print(f"{case.name}: {variant.name}: peak memory", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", f"tests.benchmarks.{case.method}", "--memory", case.name, variant.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_memory(case: Case, name: str, cache: Path) -> float:
    """MiB that a step on the longest rows needs beyond what is held before it."""
    variant = next(v for v in every_variant(case) if v.name == name)
    rows = workload.rows(case, 6 if "packing" in variant.options else 3)
    # The longest batches first: the peak belongs to them.
    order = sorted(range(len(rows)), key=lambda i: -workload.size(rows[i]))
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
        yield from variants.with_references(dtype)
    yield from variants.grid(case)


def find(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
