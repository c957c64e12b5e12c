"""Measure on a GPU: `python -m tests.benchmarks.gpu [speed|speed-dpo|fit-70B|fit-32B] [--layers N ...]`.

speed, speed-dpo: SFT and DPO steps of an 8B-shaped model against plain TRL in the same dtype, in turn in one
process. fit-70B, fit-32B:
one step of a larger model under a cap on the process's device memory. Without a part all of them, each in a
process of its own. Every size has an option; without a GPU nothing is capped, and memory reads 0.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from halfbyte.fast.layer import fell_back
from tests.benchmarks import bases, machine, report, variants, workload
from tests.benchmarks.bases import Shape
from tests.benchmarks.steps import REPEATS, WARM_UP, relative_difference
from tests.benchmarks.variants import Step, Stepper, Variant
from tests.benchmarks.workload import Case

# Times TRL's tokens a second: within its memory, and with all that is free.
LEAST = {"sft": (1.4, 1.8), "dpo": (1.8, 2.2)}
ADAM_BYTES = 8  # of state for each trained value, in float32

SPEED_EXPLANATION = """\
`loss` and `gradient` are differences from TRL's first step, which starts from the same adapter. `peak MiB` is what a
step needs beyond the loaded model and its adapters, gradients and optimizer state included."""


@dataclass(frozen=True)
class Part:
    """What one process measures; ``cap`` is in GB of 10^9 bytes, less than a card of that name has."""

    name: str
    shape: Shape
    rows: int
    tokens: int
    cap: float | None = None
    method: str = "sft"

    @property
    def case(self) -> Case:
        shape = self.shape
        return Case(
            self.name,
            shape.hidden,
            shape.layers,
            shape.vocabulary,
            length=self.tokens,
            batch=self.rows,
            method=self.method,
        )


SPEED = Part("speed", bases.LLAMA_8B, rows=2, tokens=2048)
# A prompt and two answers of 512 tokens each.
SPEED_DPO = Part("speed-dpo", bases.LLAMA_8B, rows=2, tokens=512, method="dpo")
FIT_70B = Part("fit-70B", bases.LLAMA_70B, rows=1, tokens=1024, cap=48.0)
FIT_32B = Part("fit-32B", bases.QWEN_32B, rows=1, tokens=1024, cap=24.0)
PARTS = {part.name: part for part in (SPEED, SPEED_DPO, FIT_70B, FIT_32B)}


class MeasuredStepper(Stepper):
    """A stepper that knows its own share of the device's memory, in bytes, beside others in the process.

    ``loaded`` is the model with its adapters, ``peak`` the most at any time of a step.
    """

    def __init__(self, *args: Any) -> None:
        gc.collect()
        before = torch.cuda.memory_allocated()
        super().__init__(*args)
        gc.collect()
        self.loaded = self.peak = self._held = torch.cuda.memory_allocated() - before
        self.taken: list[Step] = []
        self.first_gradients: dict[str, torch.Tensor] = {}

    def step(self) -> Step:
        before = torch.cuda.memory_allocated()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.taken.append(super().step())
        self.peak = max(self.peak, self._held + torch.cuda.max_memory_allocated() - before)
        if not self.first_gradients:
            self.first_gradients = {name: g.float().cpu() for name, g in self.gradients.items()}
        self.gradients = {}  # or the next step would hold two sets of them
        self._held += torch.cuda.memory_allocated() - before
        return self.taken[-1]

    def told(self) -> str:
        """Which path its layers took, and what it held in all."""
        gone = [f"{times} calls not fused ({why})" for why, times in fell_back(self.trainer.model).items()]
        parts = [getattr(self, "path", "plain"), *gone, f"{self.peak / 2**20:.0f} MiB in all"]
        return ", ".join(parts)


def speed(part: Part, dtype: str, repeats: int, memory_budget: str | None = None) -> list[report.Line]:
    """TRL, halfbyte within what TRL's steps were seen to need (or ``memory_budget``), halfbyte on auto."""
    _make_workspaces()
    rows = workload.rows(part.case, WARM_UP + repeats)
    steppers: list[MeasuredStepper] = []
    with bases.base(part.shape, 2 * part.tokens) as checkpoint, tempfile.TemporaryDirectory() as output:

        def warm_up(variant: Variant) -> MeasuredStepper:
            steppers.append(MeasuredStepper(variant, part.case, checkpoint, rows, Path(output)))
            for _ in range(WARM_UP):
                steppers[-1].step()
            return steppers[-1]

        trl = warm_up(variants.reference(dtype))
        warm_up(variants.halfbyte(dtype, memory_budget or f"{(trl.peak - trl.loaded) // 2**20}MiB"))
        warm_up(variants.halfbyte(dtype))
        for _ in range(repeats):
            for stepper in steppers:
                stepper.step()
    return [
        report.Line(
            variant=each.variant.name,
            steps=each.taken[WARM_UP:],
            loss_difference=abs(each.taken[0].loss - trl.taken[0].loss),
            gradient_difference=relative_difference(each.first_gradients, trl.first_gradients),
            memory=(each.peak - each.loaded) / 2**20,
            path=each.told(),
        )
        for each in steppers
    ]


def speed_targets(lines: list[report.Line], method: str) -> list[str]:
    """What was asked for, and what was measured."""
    trl, within, auto = lines
    rows = [f"| against {trl.variant} | target | measured | met |", "|---|---|---|---|"]
    for line, least in zip((within, auto), LEAST[method], strict=True):
        ratio = statistics.median(line.times_faster_than(trl))
        rows.append(f"| {line.variant} | >= {least}x | {ratio:.2f}x | {report.met(ratio >= least)} |")
    share = f"{within.memory / trl.memory:.2f}x" if trl.memory else "no GPU"
    met = report.met(0 < within.memory <= trl.memory)
    return [*rows, f"| peak memory of {within.variant} | <= 1.0x | {share} | {met} |"]


@dataclass(frozen=True)
class Fit:
    """One step under a cap, in bytes: ``paged`` is optimizer state in managed memory, which no cap counts."""

    part: Part
    loss: float
    changed: bool
    loaded: int
    peak: int
    reserved: int
    paged: int
    path: str

    @property
    def met(self) -> bool:
        assert self.part.cap is not None
        return self.changed and 0 < self.reserved <= self.part.cap * 1e9

    def table(self) -> str:
        sizes = (self.loaded, self.peak, self.reserved, self.paged)
        gigabytes = " | ".join(f"{size / 1e9:.1f}" for size in sizes)
        tokens = f"{self.part.rows} x {self.part.tokens}"
        return (
            f"{self.path}.\n\n"
            f"| part | tokens | loss | loaded GB | peak GB | reserved GB | paged GB | cap GB | met |\n"
            f"|---|---|---|---|---|---|---|---|---|\n"
            f"| {self.part.name} | {tokens} | {self.loss:.2f} | {gigabytes} | {self.part.cap} "
            f"| {report.met(self.met)} |"
        )


def fit(part: Part, dtype: str, memory_budget: str = "auto") -> Fit:
    """Take one step of ``part`` under its cap, with the optimizer state paged; run it in a fresh process."""
    if torch.cuda.is_available() and part.cap is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(part.cap * 1e9 / total, 1.0))
    options = {"optim": "paged_adamw_32bit"}
    variant = replace(variants.halfbyte(dtype, memory_budget), options=options)
    with bases.base(part.shape, part.tokens) as checkpoint, tempfile.TemporaryDirectory() as output:
        stepper = MeasuredStepper(variant, part.case, checkpoint, workload.rows(part.case, 1), Path(output))
        weights = stepper.parameters
        before = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        if torch.cuda.is_available():
            # Managed memory that outgrows the card would move to and fro, for everyone on it.
            state = ADAM_BYTES * sum(weight.numel() for weight in weights.values())
            free, _ = torch.cuda.mem_get_info()
            assert state < free, f"{state} bytes of paged optimizer state on a card with {free} free"
        step = stepper.step()
    tensors = [value for state in stepper.optimizer.state.values() for value in state.values()]
    return Fit(
        part,
        step.loss,
        all(not torch.equal(before[name], weight.detach().cpu()) for name, weight in weights.items()),
        stepper.loaded,
        stepper.peak,
        torch.cuda.max_memory_reserved(),
        sum(value.nbytes for value in tensors if getattr(value, "is_paged", False)),
        stepper.told(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=PARTS)
    for size in ("hidden", "layers", "intermediate", "heads", "kv_heads", "vocabulary", "rows", "tokens"):
        parser.add_argument(f"--{size}", type=int)
    parser.add_argument("--cap", type=float, help="GB of 10^9 bytes")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument(
        "--memory_budget",
        help="speed: of the line beside TRL's memory, not what TRL was seen to need; fit: auto",
    )
    options = parser.parse_args()
    if options.part is None:
        for name in PARTS:
            subprocess.run([sys.executable, "-m", "tests.benchmarks.gpu", name, *sys.argv[1:]], check=True)
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    disable_progress_bars()
    part = sized(PARTS[options.part], vars(options))
    print(*(f"- {name}: {value}" for name, value in machine.facts().items()), "", sep="\n", flush=True)
    if part.cap is not None:
        print(fit(part, options.dtype, options.memory_budget or "auto").table())
        return
    lines = speed(part, options.dtype, options.repeats, options.memory_budget)
    print(report.table(report.Result(part.case, lines)))
    print("\n".join([*speed_targets(lines, part.method), "", SPEED_EXPLANATION]))


def sized(part: Part, sizes: dict[str, Any]) -> Part:
    """``part`` with those of its sizes that are given."""
    given = {name: value for name, value in sizes.items() if value is not None}
    shape = {name: value for name, value in given.items() if name in Shape.__dataclass_fields__}
    own = {name: value for name, value in given.items() if name in ("rows", "tokens", "cap")}
    return replace(part, shape=replace(part.shape, **shape), **own)


def _make_workspaces() -> None:
    """Have cuBLAS take what it keeps, for the forward's thread and the backward's: no stepper's share has it."""
    ones = torch.ones(8, 8, device="cuda" if torch.cuda.is_available() else "cpu", requires_grad=True)
    (ones @ ones).sum().backward()


if __name__ == "__main__":
    main()
