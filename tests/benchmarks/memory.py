"""Measure what the memory model predicts: `python -m tests.benchmarks.memory [--write] [--only WORDS]`.

Each point is a run of two steps in a process of its own: RssAnon, sampled from the first step to the last, less what
was there before the base was loaded, with the weights that are mapped from a file, beside the prediction in run.json.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false"
)


from halfbyte import memory, recipe, run
from halfbyte.tracking import held_memory
from tests import forked
from tests.benchmarks import machine, results, workload
from tests.benchmarks.watched import anonymous
from tests.benchmarks.workload import Case
from tests.distributed import sharded

STEPS = 2
LEAST = 200 * 10**6  # bytes: smaller points are not judged
MEDIAN, WORST = 0.10, 0.20


@dataclass(frozen=True)
class Point:
    """One run: the shape of its base, its rows, and the options that decide what it holds."""

    recipe: str = "sft"
    hidden: int = 1024
    layers: int = 4
    vocabulary: int = 8192
    length: int = 512
    batch: int = 4
    rank: int = 16
    optim: str = "adamw_torch"
    dtype: str = "bfloat16"
    level: int | None = 3
    fast: str = "auto"
    checkpointing: bool = True
    accumulation: int = 1
    strategy: str = "single"
    evaluated: int = 0
    experts: int = 0
    adapted: bool = False
    architecture: str = "llama"

    @property
    def name(self) -> str:
        """What differs from the defaults, to print and to choose by."""
        found = [f"{key} {value}" for key, value in vars(self).items() if value != getattr(Point, key)]
        return ", ".join(found) or "default"


def points() -> list[Point]:
    """The grid: every dimension on its own, and some together."""
    found = [Point(level=level, length=length) for level in range(4) for length in (256, 512)]
    found += [Point(level=level, dtype="float32") for level in range(4)]
    found += [Point(hidden=512, layers=8, vocabulary=32_768, level=level) for level in (0, 1, 3)]
    found += [Point(hidden=768, layers=6, vocabulary=16_384, level=level) for level in (0, 3)]
    found += [Point(length=length, batch=1, level=level) for length in (1024, 2048) for level in (0, 3)]
    found += [Point(rank=rank, level=0) for rank in (4, 64, 128)]
    optims = ("adamw_8bit", "sgd", "adafactor", "lion_32bit")
    found += [Point(rank=64, level=0, optim=optim) for optim in optims]
    found += [Point(accumulation=2, rank=64, level=level) for level in (0, 3)]
    dpo = partial(Point, recipe="dpo", length=128)
    found += [dpo(level=level, batch=batch) for level in range(4) for batch in (2, 4)]
    found += [dpo(level=3, dtype="float32"), dpo(level=0, length=256), dpo(level=3, rank=64)]
    found += [Point(fast="none", level=None), Point(recipe="dpo", length=128, fast="none", level=None)]
    for evaluated in (8, 16):
        found += [Point(batch=1, evaluated=evaluated, level=level) for level in (0, 3)]
    found += [Point(batch=1, evaluated=16, dtype="float32"), dpo(batch=1, evaluated=16)]
    found += [Point(batch=1, evaluated=8, fast="none", level=None)]
    moe = partial(Point, experts=16)
    for dtype, level in product(("bfloat16", "float32"), (0, 3)):
        found += [
            moe(level=level, dtype=dtype),
            moe(level=level, dtype=dtype, adapted=True),
            moe(level=level, dtype=dtype, hidden=512, batch=8),
            moe(level=level, dtype=dtype, recipe="dpo", length=128),
        ]
    found.append(moe(fast="none", level=None))
    for architecture, level in product(("minicpm3", "lfm2", "qwen3_5_text"), (0, 3)):
        other = partial(Point, architecture=architecture, level=level, dtype="float32")
        found += [other(), other(recipe="dpo", length=128)]
    found += [Point(strategy=strategy, level=level) for strategy in ("cpu", "fsdp2") for level in (0, 3)]
    return [*found, *(Point(fast=fast, level=None, checkpointing=False) for fast in ("none", "auto"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="points whose name has all of these")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    asked = parser.parse_args()
    lines = []
    for point in points():
        if asked.only is None or all(word in point.name for word in asked.only):
            found = measure(point)
            lines.append((point, found))
            print(row(point, found), json.dumps(found["parts"]), file=sys.stderr, flush=True)
    print(text := table(lines))
    if asked.write:
        results.write(
            f"{results.MEMORY}\n\n{machine.run('memory', sys.argv[1:], f'{STEPS} steps each')}\n\n{text}"
        )


def measure(point: Point) -> dict[str, Any]:
    """Run ``point`` in a process that has imported everything and run nothing, and return what it found.

    What an earlier run freed would be in its allocator, and take up what this one allocates.
    Two processes are launched, and the larger of what they measured is taken.
    """
    if point.strategy != "single":
        with tempfile.TemporaryDirectory() as scratch:
            words = prepare(point, Path(scratch))
            budget = "min" if point.level == 0 else "auto"
            done = sharded.start(point.strategy, 2, *words, f"--memory_budget={budget}")
            assert done.returncode == 0, done.stderr[-2000:]
            return told(Path(scratch))
    found: dict[str, Any] = forked.call(_silently, point)
    return found


def _silently(point: Point) -> dict[str, Any]:
    for name in ("sft", "dpo"):  # what a run has imported before it measures
        recipe.load(name)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        return take(point)


def take(point: Point) -> dict[str, Any]:
    """Train ``point`` here; return the sampled peak, what the run measured itself, and the predicted parts."""
    with tempfile.TemporaryDirectory() as scratch, sampled() as sample:
        if point.level is not None:
            choose = memory.choose
            memory.choose = lambda *given, **named: choose(*given, **{**named, "recorded": point.level})
        run.main(point.recipe, recipe.load(point.recipe), prepare(point, Path(scratch))[1:])
        found = told(Path(scratch))
    return {**found, "sampled": sample.peak - sample.before + sample.mapped}


def prepare(point: Point, scratch: Path) -> list[str]:
    """Write the base and the rows of ``point``, and return the words of its command."""
    cache = Path(tempfile.gettempdir()) / "halfbyte-benchmarks"
    cache.mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    case = Case(
        "memory",
        hidden=point.hidden,
        layers=point.layers,
        vocabulary=point.vocabulary,
        experts=point.experts,
        architecture=point.architecture,
    )
    written = [json.dumps(each) for each in rows(point)]
    (scratch / "rows").mkdir()
    for split in ("train", "test"):
        (scratch / "rows" / f"{split}.jsonl").write_text("\n".join(written), encoding="utf-8")
    chosen = options(point, workload.checkpoint(case, cache), scratch / "rows")
    if point.evaluated:
        chosen |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": point.evaluated}
    if point.adapted:
        chosen |= {"lora_target_parameters": "[experts.gate_up_proj, experts.down_proj]"}
    words = [f"--{name}={value}" for name, value in chosen.items()]
    return [point.recipe, *words, f"--output_dir={scratch}/run"]


def told(scratch: Path) -> dict[str, Any]:
    """What run.json says of memory: the larger peak of the ranks, and the predicted parts."""
    found = json.loads((scratch / "run" / "run.json").read_text(encoding="utf-8"))["memory"]
    return {
        "sampled": max(found["measured"]),
        "measured": max(found["measured"]),
        "predicted": found["predicted"]["total"],
        "parts": {name: round(size / 2**20, 1) for name, size in found["predicted"].items()},
    }


def options(point: Point, base: Path, data: Path) -> dict[str, Any]:
    """The command line of ``point``."""
    return {
        "model_name_or_path": base,
        "dataset_name": data,
        "dtype": point.dtype,
        "optim": point.optim,
        "lora_r": point.rank,
        "fast": point.fast,
        "gradient_checkpointing": point.checkpointing,
        "per_device_train_batch_size": point.batch,
        "gradient_accumulation_steps": point.accumulation,
        "max_steps": STEPS,
        "max_length": 4096,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }


def rows(point: Point) -> Iterator[dict[str, str]]:
    """Rows of ``length`` words; a pair is a prompt and two answers of as many each."""
    draw = random.Random(3)

    def words() -> str:
        return "".join(f" w{draw.randrange(4, point.vocabulary)}" for _ in range(point.length - 1))

    for _ in range(max(2 * STEPS * point.batch * point.accumulation, point.evaluated)):
        yield {
            name: words()
            for name in (("text",) if point.recipe == "sft" else ("prompt", "chosen", "rejected"))
        }


class Sample(threading.Thread):
    """The peak of RssAnon from the first step on, what it was before the base was loaded, and what a file holds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = self.mapped = 0
        self.training = False

    def run(self) -> None:
        while self.training:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.002)


@contextlib.contextmanager
def sampled() -> Iterator[Sample]:
    """Sample from where the run itself begins to measure."""
    sample, restart, begin = Sample(), memory.Peak.restart, memory.Peak.__init__
    mapped = held_memory.mapped_bytes

    def begun(self: memory.Peak, *given: Any) -> None:
        begin(self, *given)
        sample.before = anonymous()

    def restarted(self: memory.Peak) -> None:
        restart(self)
        sample.training = True
        sample.start()

    def counted(model: Any) -> int:
        sample.mapped = mapped(model)
        return sample.mapped

    memory.Peak.__init__, memory.Peak.restart = begun, restarted  # type: ignore[method-assign]
    held_memory.mapped_bytes = counted
    try:
        yield sample
    finally:
        sample.training = False


def difference(found: dict[str, Any]) -> float:
    """Predicted over measured, less 1."""
    return float(found["predicted"] / found["sampled"] - 1)


def row(point: Point, found: dict[str, Any]) -> str:
    sizes = (f"{found[name] / 10**6:.0f}" for name in ("sampled", "measured", "predicted"))
    return f"| {point.name} | {' | '.join(sizes)} | {difference(found):+.0%} |"


def table(lines: list[tuple[Point, dict[str, Any]]]) -> str:
    """Every point, and how far off the prediction is over those that are large enough."""
    judged = [abs(difference(found)) for _, found in lines if found["sampled"] >= LEAST]
    head = ["| point | sampled, MB | by the run | predicted | difference |", "|---|---|---|---|---|"]
    said = "No point is large enough."
    if judged:
        middle, worst = statistics.median(judged), max(judged)
        met = "met" if middle <= MEDIAN and worst <= WORST else "NOT met"
        said = (
            f"Of {len(judged)} points of {LEAST // 10**6} MB or more: median {middle:.1%} off ({MEDIAN:.0%} asked), "
            f"worst {worst:.1%} ({WORST:.0%} asked): {met}."
        )
    return "\n".join([*head, *(row(*line) for line in lines), "", said])


if __name__ == "__main__":
    main()
