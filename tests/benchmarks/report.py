"""What a benchmark run found, as tables."""

import statistics
from dataclasses import dataclass, field

from tests.benchmarks.variants import Step
from tests.benchmarks.workload import Case

HEADER = (
    "| variant | ms a step | tokens/s | x first | spread | loss | gradient | peak MiB |\n"
    "|---|---|---|---|---|---|---|---|"
)

# What is asked for, of halfbyte in its own dtype, on the threshold cases: (against, at least).
TARGETS = {
    "lognormal": (("TRL bfloat16, checkpointing", 2.8), ("best", 1.8), ("TRL float32, checkpointing", 1.5)),
    "pairs, lognormal": (("TRL", 3.5), ("best", 2.0), ("precomputed", 2.0)),
    "pairs, fixed 128": (("TRL", 2.2), ("best", 1.5), ("precomputed", 2.0)),
    "pairs, long shared prefix": (("TRL", 5.0), ("best", 3.0), ("precomputed", 2.0)),
    "experts, lognormal": (("TRL", 1.5),),
    "experts, pairs, lognormal": (("TRL", 1.5),),
    "fixed 512": (("TRL bfloat16, checkpointing", 2.0), ("best", 1.4), ("TRL float32, checkpointing", 1.5)),
}
MEMORY_TARGET = {"sft": 0.5, "dpo": 0.4}
EXPERTS_MEMORY_TARGET = 1.0
LARGE = "Of TRL only the dtype that is fast here: with the other columns the full run would pass its hour."


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
    """One case; ``grid`` is tokens a second of each of TRL's options, ``best`` the name of the best.

    ``suffix`` tells its section from another of the same case, ``note`` says under which conditions it was measured.
    """

    case: Case
    lines: list[Line]
    grid: dict[str, float] = field(default_factory=dict)
    best: str | None = None
    suffix: str = ""
    note: str = ""


def table(result: Result) -> str:
    """One case as a Markdown table under its name."""
    case, first = result.case, result.lines[0]
    experts = f", {case.experts} experts, 2 a token" if case.experts else ""
    kind = f"H {case.hidden}, {case.layers} layers{experts}, V {case.vocabulary}, batch {case.batch}"
    kind += f", dropout {case.dropout}"
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
    about = [f"{kind}.{f' {result.note}' if result.note else ''}", *([LARGE] if case.large else [])]
    parts = [f"### {case.name}{result.suffix}", "", *about, "", *paths, "", HEADER, *rows, ""]
    return "\n".join([*parts, *(tried if grid else []), *targets(result)])


def targets(result: Result) -> list[str]:
    """What was asked for on a threshold case, and what was measured."""
    named = {line.variant: line for line in result.lines}
    ours, first = result.lines[1], result.lines[0]
    rows = []
    for against, least in TARGETS.get(result.case.name, ()):
        one, line = ours, named.get(result.best or "" if against == "best" else against)
        if against == "TRL":
            line = first
        if against == "precomputed":
            one, line = (next(x for x in result.lines if _precomputed(x, who)) for who in ("halfbyte", "TRL"))
        if line is not None:
            label = f"the best TRL options ({line.variant})" if against == "best" else line.variant
            label += f" (by {one.variant})" if one is not ours else ""
            ratio = statistics.median(one.times_faster_than(line))
            rows.append(f"| {label} | >= {least}x | {ratio:.2f}x | {met(ratio >= least)} |")
    if rows:
        rows += _in_bfloat16(result.lines[2:])
        share = ours.memory / first.memory
        most = EXPERTS_MEMORY_TARGET if result.case.experts else MEMORY_TARGET[result.case.method]
        rows.append(f"| peak memory of {first.variant} | <= {most}x | {share:.2f}x | {met(share <= most)} |")
        rows = [f"| {ours.variant} against | target | measured | met |", "|---|---|---|---|", *rows, ""]
    return rows


def _precomputed(line: Line, who: str) -> bool:
    return line.variant.startswith(who) and line.variant.endswith("references precomputed")


def met(target: bool) -> str:
    """How a table says whether a target is met."""
    return "yes" if target else "NO"


def _in_bfloat16(others: list[Line]) -> list[str]:
    """For information: bfloat16 on both sides, against the best of TRL's that was measured."""
    ours = [line for line in others if line.variant == "halfbyte bfloat16"]
    theirs = [line for line in others if line.variant.startswith("TRL bfloat16")]
    if not ours or not theirs:
        return []
    best = max(theirs, key=lambda line: line.tokens_per_second)
    ratio = statistics.median(ours[0].times_faster_than(best))
    return [f"| {best.variant} (by {ours[0].variant}) | none | {ratio:.2f}x | |"]


def _difference(value: float | None) -> str:
    return "other rows" if value is None else f"{value:.1e}"
