"""What bounds a step of ours: `python -m tests.benchmarks.profile [--case NAME] [--dtype bfloat16] [--steps 6]`.

Operations of halfbyte's steps on one thread, each laid to the part of the fast step that runs it, as shares of the time
of all; and the FLOPs of the base's products beside those of a large product here.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import disable_progress_bars
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.utils import logging

from halfbyte.fast import attention_cpu, gate, norm, rope, scores
from halfbyte.fast.projections import Projections
from tests.benchmarks import steps, variants, workload
from tests.benchmarks.workload import CASES

WARM_UP = 2
TOP = 4
# The functions of each part; what runs inside several belongs to the innermost.
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "attention": ((attention_cpu, "forward"), (attention_cpu, "backward")),
    "dequantization": ((Projections, "weight"),),
    "norms": ((norm, "norm_forward"), (norm, "norm_backward")),
    "rotary": ((rope, "rotate_"),),
    "gate": ((gate.Gate, "forward"), (gate.Gate, "backward")),
    "head": ((scores._Scores, "forward"), (scores._Scores, "backward")),
}
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "aten::bmm", "aten::baddbmm_"}
_NARROW = 64  # ranks: products that have a side of fewer values are LoRA's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--case", choices=[case.name for case in CASES])
    parser.add_argument("--dtype", default=variants.native_dtype())
    parser.add_argument("--steps", type=int, default=6)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    disable_progress_bars()
    cache = Path(tempfile.gettempdir()) / "halfbyte-benchmarks"
    cache.mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    for case in CASES:
        if asked.case in (None, case.name) and (asked.case or case.threshold):
            print(table(case, asked.dtype, asked.steps, cache), flush=True)


def table(case: workload.Case, dtype: str, count: int, cache: Path) -> str:
    """The parts of a step of ``case``, the largest first."""
    with tempfile.TemporaryDirectory() as output, laid_to_parts():
        (stepper,) = steps.start(case, [variants.halfbyte(dtype)], WARM_UP + count + 1, cache, output)
        for _ in range(WARM_UP):
            stepper.step()
        seconds = sorted(stepper.step().seconds for _ in range(count))[count // 2]
        # One step: the profiler keeps a gigabyte of events or more.
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            stepper.step()
    spent, flops = shares(found.events())
    whole = sum(spent.values())
    lines = [f"### {case.name}, {dtype}: {seconds * 1000:.0f} ms a step (median of {count})", ""]
    lines += ["| part | share | ms | largest operations |", "|---|---|---|---|"]
    for part, operations in sorted(spent_by_part(spent).items(), key=lambda item: -sum(item[1].values())):
        time_ = sum(operations.values())
        largest = ", ".join(f"{name} {100 * each / whole:.1f}%" for name, each in operations.most_common(TOP))
        lines.append(f"| {part} | {time_ / whole:.1%} | {1000 * seconds * time_ / whole:.0f} | {largest} |")
    share = sum(spent_by_part(spent)["products of the base"].values()) / whole
    rate = flops / (seconds * share)  # of the process's own time: others may run beside it
    peak = peak_flops(getattr(torch, dtype))
    lines += [
        "",
        f"The base's products: {rate / 1e9:.0f} GFLOP/s; a product of 2048 x 1536 x 512 here: {peak / 1e9:.0f}.",
    ]
    return "\n".join(lines)


@contextmanager
def laid_to_parts() -> Iterator[None]:
    """Have the functions of :data:`PARTS` be seen by the profiler under the names of their parts."""
    kept: list[tuple[Any, str, Any]] = []

    def wrapped(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            with record_function(f"part: {part}"):
                return function(*args, **named)

        return call

    for part, functions in PARTS.items():
        for owner, name in functions:
            original = owner.__dict__[name]
            kept.append((owner, name, original))
            function = original.__func__ if isinstance(original, staticmethod) else original
            replaced = wrapped(part, function)
            setattr(owner, name, staticmethod(replaced) if isinstance(original, staticmethod) else replaced)
    try:
        yield
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)


def shares(events: Any) -> tuple[Counter[tuple[str, str]], float]:
    """Microseconds of each operation by part, without what it calls; and the FLOPs of the base's products."""
    spent: Counter[tuple[str, str]] = Counter()
    flops = 0.0
    for event in events:
        if event.name.startswith("part: "):
            continue
        part = part_of(event)
        spent[part, event.name.removeprefix("aten::")] += event.self_cpu_time_total
        if part == "products of the base" and event.name in _PRODUCTS - {"aten::linear"}:
            flops += flops_of(event)
    return spent, flops


def part_of(event: Any) -> str:
    parent = event
    while parent is not None:
        if parent.name.startswith("part: "):
            return str(parent.name.removeprefix("part: "))
        if "Optimizer" in parent.name:
            return "optimizer"
        parent = parent.cpu_parent
    if event.name in _PRODUCTS or "mkldnn" in event.name:
        sides = [side for shape in (event.input_shapes or []) for side in shape]
        return "products of LoRA" if sides and min(sides) <= _NARROW else "products of the base"
    return "the rest"


def flops_of(event: Any) -> float:
    shapes = [shape for shape in event.input_shapes if len(shape) == 2]
    (rows, inner), (_, columns) = shapes[-2:]
    return 2.0 * rows * inner * columns


def spent_by_part(spent: Counter[tuple[str, str]]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for (part, name), each in spent.items():
        found[part][name] += each
    return found


def peak_flops(dtype: torch.dtype) -> float:
    """The FLOP/s of a product of the size of a layer's, the median of many."""
    x, weight = torch.randn(2048, 512).to(dtype), torch.randn(1536, 512).to(dtype)
    taken = []
    for _ in range(40):
        begin = time.process_time()
        torch.mm(x, weight.t())
        taken.append(time.process_time() - begin)
    return 2.0 * 2048 * 1536 * 512 / sorted(taken)[len(taken) // 2]


if __name__ == "__main__":
    sys.exit(main())
