"""Measure SFT steps against plain TRL: `python -m tests.benchmarks.sft [--quick] [--bf16] [--write]`.

All variants of a case live in one process and take their steps in turn, on the same rows, so that a busy
machine slows all of them. On CPU the clock is the process's CPU time on one thread. Peak memory is measured
apart, with one process for each variant.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from tests.benchmarks import report, variants, workload
from tests.benchmarks.variants import Stepper, Variant
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
        found = measure(case, columns(case, options), options.repeats, cache)
        results.append(found)
        print(report.table(found), flush=True)
        if options.write:  # after each case: a run that is cut short leaves what it has measured
            text = report.page(results, machine(), "--quick" if options.quick else "in full", options.repeats)
            (Path(__file__).parent / "RESULTS.md").write_text(text, encoding="utf-8")


def columns(case: Case, options: argparse.Namespace) -> list[Variant]:
    """TRL in the dtype that is fast here, first; halfbyte in it; then the others that were asked for."""
    fast_dtype = variants.native_dtype()
    found = [variants.reference(fast_dtype), variants.halfbyte(fast_dtype)]
    if case.threshold:
        found.append(variants.halfbyte(fast_dtype, "min"))
    if options.bf16 or fast_dtype == "bfloat16":
        found += [v for v in (variants.reference("bfloat16"), variants.TRL_DEFAULTS) if v not in found]
    if case.threshold and not options.quick:
        found += [v for v in variants.grid(fast_dtype) if v.name not in {f.name for f in found}]
    return found


def measure(case: Case, columns: list[Variant], repeats: int, cache: Path) -> report.Result:
    """Interleave the steps of all variants; the first is what the others are compared with."""
    checkpoint = workload.checkpoint(case, cache)
    rows = workload.rows(case, WARM_UP + repeats)
    with tempfile.TemporaryDirectory() as output:
        steppers = [Stepper(variant, case, checkpoint, rows, Path(output)) for variant in columns]
        seconds: list[list[float]] = [[] for _ in columns]
        losses: list[list[float]] = [[] for _ in columns]
        gradients: list[dict[str, torch.Tensor]] = []
        for step in range(WARM_UP + repeats):
            for i, stepper in enumerate(steppers):
                loss, taken = stepper.step()
                losses[i].append(loss)
                if step >= WARM_UP:
                    seconds[i].append(taken)
                if step == 0:
                    gradients.append({name: g.float().clone() for name, g in stepper.gradients.items()})
                stepper.gradients = {}
    tokens = [
        sum(len(ids) for ids in rows[case.batch * step : case.batch * (step + 1)]["input_ids"])
        for step in range(WARM_UP, WARM_UP + repeats)
    ]
    lines = []
    for i, variant in enumerate(columns):
        ratios = [base / taken for base, taken in zip(seconds[0], seconds[i], strict=True)]
        lines.append(
            report.Line(
                variant=variant.name,
                milliseconds=statistics.median(seconds[i]) * 1e3,
                tokens_per_second=statistics.median(n / s for n, s in zip(tokens, seconds[i], strict=True)),
                ratio=statistics.median(ratios),
                spread=(min(ratios), max(ratios)),
                loss_difference=max(abs(a - b) for a, b in zip(losses[0], losses[i], strict=True)),
                gradient_difference=relative_difference(gradients[i], gradients[0]),
                memory=child_memory(case, variant),
                path=getattr(steppers[i], "path", ""),
            )
        )
    return report.Result(case, lines)


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
    variant = next(v for v in every_variant() if v.name == name)
    rows = workload.rows(case, 3)
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


def every_variant() -> Iterator[Variant]:
    yield variants.TRL_DEFAULTS
    for dtype in ("float32", "bfloat16"):
        yield variants.halfbyte(dtype)
        yield variants.halfbyte(dtype, "min")
        yield variants.reference(dtype)
        yield from variants.grid(dtype)


def find(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def machine() -> dict[str, str]:
    """What the numbers depend on, apart from the code."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    native = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    libraries = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
    return {
        "CPU": f"{cpu}, {os.cpu_count()} cores, {', '.join(native)}",
        "GPU": gpu,
        "threads": str(torch.get_num_threads()),
        "Python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "CPU time of the run": f"{resource.getrusage(resource.RUSAGE_SELF).ru_utime / 60:.0f} min",
    }


if __name__ == "__main__":
    main()
