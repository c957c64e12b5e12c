"""What a benchmark run found, as tables and as RESULTS.md."""

from dataclasses import dataclass
from typing import Any

HEADER = (
    "| variant | ms a step | tokens/s | x first | spread | loss | gradient | peak MiB |\n"
    "|---|---|---|---|---|---|---|---|"
)

EXPLANATION = """\
`tokens/s` counts real tokens (padding excluded). `x first` is the median over steps of the first line's time
over this line's, each pair on the same rows in the same turn; `spread` is the least and the largest. `loss` is
the largest difference of a step's loss from the first line's, `gradient` the relative difference of all adapter
gradients at the first step. `peak MiB` is what one step on the longest rows needs beyond what is held before
it, in a process of its own."""

NOT_SHOWN = """\
- Nothing here ran on a GPU: what CUDA kernels, memory bandwidth and larger models change is not measured.
- The models are random Llamas of 8 layers; layers of an 8B model have a larger share of matrix products.
- One thread, CPU time: waiting, data loading in other processes and the scaling over cores are not in it.
- Steps only: not loading, tokenizing, evaluating, logging or saving.
- bfloat16 numbers hold for this CPU only; see the flags above for whether it multiplies bfloat16 natively."""


@dataclass(frozen=True)
class Line:
    variant: str
    milliseconds: float
    tokens_per_second: float
    ratio: float
    spread: tuple[float, float]
    loss_difference: float
    gradient_difference: float
    memory: float
    path: str


@dataclass(frozen=True)
class Result:
    case: Any
    lines: list[Line]


def table(result: Result) -> str:
    """One case as a Markdown table under its name."""
    case = result.case
    kind = f"H {case.hidden}, {case.layers} layers, V {case.vocabulary}, batch {case.batch}, dropout {case.dropout}"
    rows = [
        f"| {x.variant} | {x.milliseconds:.0f} | {x.tokens_per_second:.0f} | {x.ratio:.2f} "
        f"| {x.spread[0]:.2f}-{x.spread[1]:.2f} | {x.loss_difference:.1e} | {x.gradient_difference:.1e} "
        f"| {x.memory:.0f} |"
        for x in result.lines
    ]
    paths = [f"{x.variant}: {x.path}." for x in result.lines if x.path]
    return "\n".join([f"### {case.name}", "", kind + ".", "", *paths, "", HEADER, *rows, ""])


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
