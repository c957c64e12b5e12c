"""What a benchmark run found, as tables and as RESULTS.md."""

import statistics
from dataclasses import dataclass, field

from tests.benchmarks.variants import Step
from tests.benchmarks.workload import Case

HEADER = (
    "| variant | ms a step | tokens/s | x first | spread | loss | gradient | peak MiB |\n"
    "|---|---|---|---|---|---|---|---|"
)

EXPLANATION = """\
`tokens/s` counts real tokens (padding excluded). `x first` is the median over steps of the first line's time
over this line's, both per token, each pair in the same turn and, but for packing, on the same rows; `spread` is
the least and the largest. `loss` is the largest difference of a step's loss from the first line's, `gradient`
the relative difference of all adapter gradients at the first step. `peak MiB` is what one step on the longest
rows needs beyond what is held before it, in a process of its own. The grid is TRL's options, three steps each
after one to warm up; the best of them is measured again beside the others."""

NOT_SHOWN = """\
- Nothing here ran on a GPU: what CUDA kernels, memory bandwidth and larger models change is not measured.
- The models are random Llamas of 8 layers; layers of an 8B model have a larger share of matrix products.
- One thread, CPU time: waiting, data loading in other processes and the scaling over cores are not in it.
- Steps only: what lies outside them is in the last table, if it was measured.
- bfloat16 numbers hold for this CPU only; see the flags above for whether it multiplies bfloat16 natively.
- TRL's selective checkpointing is not in the grid: with these versions its `train()` raises "Unexpected keyword
  arguments: selective"."""

# What is asked for, of halfbyte in its own dtype, on the threshold cases: (against, at least).
TARGETS = {
    "lognormal": (("TRL bfloat16, checkpointing", 2.8), ("best", 1.8), ("TRL float32, checkpointing", 1.5)),
    "fixed 512": (("TRL bfloat16, checkpointing", 2.0), ("best", 1.4), ("TRL float32, checkpointing", 1.5)),
}
MEMORY_TARGET = 0.5


@dataclass(frozen=True)
class Line:
    """One variant's steps; the differences are None where its batches are others than the first line's."""

    variant: str
    steps: list[Step]
    loss_difference: float | None
    gradient_difference: float | None
    memory: float
    path: str

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(step.tokens / step.seconds for step in self.steps)

    def times_faster_than(self, other: "Line") -> list[float]:
        pairs = zip(self.steps, other.steps, strict=True)
        return [theirs.seconds / theirs.tokens * ours.tokens / ours.seconds for ours, theirs in pairs]


@dataclass(frozen=True)
class Result:
    """One case; ``grid`` is tokens a second of each of TRL's options, ``best`` the name of the best."""

    case: Case
    lines: list[Line]
    grid: dict[str, float] = field(default_factory=dict)
    best: str | None = None


def table(result: Result) -> str:
    """One case as a Markdown table under its name."""
    case, first = result.case, result.lines[0]
    kind = f"H {case.hidden}, {case.layers} layers, V {case.vocabulary}, batch {case.batch}, dropout {case.dropout}"
    rows = []
    for line in result.lines:
        ratios = line.times_faster_than(first)
        milliseconds = statistics.median(step.seconds for step in line.steps) * 1e3
        rows.append(
            f"| {line.variant} | {milliseconds:.0f} | {line.tokens_per_second:.0f} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f}-{max(ratios):.2f} | {_difference(line.loss_difference)} "
            f"| {_difference(line.gradient_difference)} | {line.memory:.0f} |"
        )
    paths = [f"{line.variant}: {line.path}." for line in result.lines if line.path]
    grid = sorted(result.grid.items(), key=lambda item: -item[1])
    tried = ["The grid, tokens/s: " + "; ".join(f"{name} {rate:.0f}" for name, rate in grid) + ".", ""]
    parts = [f"### {case.name}", "", kind + ".", "", *paths, "", HEADER, *rows, ""]
    return "\n".join([*parts, *(tried if grid else []), *targets(result)])


def targets(result: Result) -> list[str]:
    """What was asked for on a threshold case, and what was measured."""
    named = {line.variant: line for line in result.lines}
    ours, first = result.lines[1], result.lines[0]
    rows = []
    for against, least in TARGETS.get(result.case.name, ()):
        line = named.get(result.best or "" if against == "best" else against)
        if line is not None:
            label = f"the best TRL options ({line.variant})" if against == "best" else line.variant
            ratio = statistics.median(ours.times_faster_than(line))
            rows.append(f"| {label} | >= {least}x | {ratio:.2f}x | {'yes' if ratio >= least else 'NO'} |")
    if rows:
        share = ours.memory / first.memory
        met = "yes" if share <= MEMORY_TARGET else "NO"
        rows.append(f"| peak memory of {first.variant} | <= {MEMORY_TARGET}x | {share:.2f}x | {met} |")
        rows = [f"| {ours.variant} against | target | measured | met |", "|---|---|---|---|", *rows, ""]
    return rows


def page(results: list[Result], machine: dict[str, str], how: str, repeats: int) -> str:
    """RESULTS.md: the machine, the tables, how to read them and what they do not show."""
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    tables = "\n".join(table(result) for result in results)
    return (
        f"# SFT steps: halfbyte against plain TRL\n\n"
        f"Written by `python -m tests.benchmarks.sft`, run {how} with {repeats} steps after 2 to warm up. Same "
        f"checkpoint, rows, order, batch and AdamW; NF4 with double quantization, LoRA r 16 on all linears.\n\n"
        f"{facts}\n\n{EXPLANATION}\n\n{tables}\n## What this does not show\n\n{NOT_SHOWN}\n"
    )


def _difference(value: float | None) -> str:
    return "other rows" if value is None else f"{value:.1e}"
