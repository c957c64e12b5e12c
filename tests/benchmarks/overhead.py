"""Measure what lies outside the steps against `trl sft`: `python -m tests.benchmarks.overhead [--repeats N] [--write]`.

Both run the same job in turn, in one process, from parsed options to final files: until the first step begins,
what a logged step adds, what a saved step adds, and from the last step to the end. Process CPU time.
"""

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled"
)

import torch
from datasets import disable_progress_bars
from transformers import Trainer
from trl.scripts.sft import main as trl_main
from trl.scripts.sft import make_parser

from halfbyte.cli import main as halfbyte_main
from tests.benchmarks import machine, results, workload
from tests.benchmarks.workload import Case

CASE = Case("overhead", hidden=256, layers=4, vocabulary=8192, batch=2)
STEPS, SAVED_EVERY = 8, 4
ROWS = 400
JOB = (
    "The same job by `trl sft` and by `halfbyte sft`, in turn (H 256, 4 layers, 8 steps, every 4th saved), "
    "process CPU time."
)

Phases = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    found: dict[str, list[Phases]] = {"TRL": [], "halfbyte": []}
    runs: dict[str, Callable[[list[str]], object]] = {"TRL": trl, "halfbyte": halfbyte}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch  # the first run, which warms up, also quantizes the base
        checkpoint, rows = workload.checkpoint(CASE, Path(scratch)), write_rows(Path(scratch) / "rows")
        for turn in range(1 + asked.repeats):
            for name, run in runs.items():
                words = options(checkpoint, rows, Path(scratch) / f"{name}-{turn}")
                phases = measure(run, words)
                if turn:
                    found[name].append(phases)
    text = table(found)
    print(text)
    if asked.write:
        about = machine.run("overhead", sys.argv[1:], f"{asked.repeats} runs of each after one to warm up")
        results.write(f"{results.OVERHEAD}\n\n{about} {JOB}\n\n{text}")


def options(checkpoint: Path, rows: Path, output: Path) -> list[str]:
    """One job in words that both command lines take."""
    chosen = {
        "model_name_or_path": checkpoint,
        "dataset_name": rows,
        "output_dir": output,
        "load_in_4bit": True,
        "use_bnb_nested_quant": True,
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "lora_dropout": 0.0,
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "optim": "adamw_torch",
        "max_steps": STEPS,
        "per_device_train_batch_size": CASE.batch,
        "logging_steps": 1,
        "save_steps": SAVED_EVERY,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return [word for key, value in chosen.items() for word in (f"--{key}", str(value))]


def trl(words: list[str]) -> None:
    """`trl sft WORDS` without its launcher."""
    trl_main(*make_parser().parse_args_into_dataclasses(args=words))


def halfbyte(words: list[str]) -> None:
    """`halfbyte sft WORDS`."""
    assert halfbyte_main(["sft", *words]) == 0


def measure(run: Callable[[list[str]], object], words: list[str]) -> Phases:
    """CPU seconds of the phases of one run."""
    with (
        stopwatch() as at,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        begin = time.process_time()
        run(words)
        end = time.process_time()
    steps, after = at["steps"], at["after"]
    saved = [seconds for i, seconds in enumerate(after, start=1) if i % SAVED_EVERY == 0]
    logged = [seconds for i, seconds in enumerate(after, start=1) if i % SAVED_EVERY]
    return {
        "start to first step": steps[0] - begin,
        "a logged step adds": statistics.median(logged),
        "a logged and saved step adds": statistics.median(saved),
        "last step to end": end - at["ends"][-1],
    }


@contextlib.contextmanager
def stopwatch() -> Iterator[dict[str, list[float]]]:
    """When each step began, what logging and saving took after it, and when that ended."""
    at: dict[str, list[float]] = {"steps": [], "after": [], "ends": []}
    step, after = Trainer.training_step, Trainer._maybe_log_save_evaluate

    def timed_step(self: Trainer, *args: object, **kwargs: object) -> object:
        at["steps"].append(time.process_time())
        return step(self, *args, **kwargs)

    def timed_after(self: Trainer, *args: object, **kwargs: object) -> None:
        begin = time.process_time()
        after(self, *args, **kwargs)
        at["ends"].append(time.process_time())
        at["after"].append(at["ends"][-1] - begin)

    Trainer.training_step, Trainer._maybe_log_save_evaluate = timed_step, timed_after
    try:
        yield at
    finally:
        Trainer.training_step, Trainer._maybe_log_save_evaluate = step, after


def write_rows(directory: Path) -> Path:
    """Texts of the tokenizer's words, as train.jsonl."""
    draw = random.Random(7)
    directory.mkdir()
    texts = [" ".join(f"w{draw.randrange(4, CASE.vocabulary)}" for _ in range(100)) for _ in range(ROWS)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (directory / "train.jsonl").write_text(content, encoding="utf-8")
    return directory


def table(found: dict[str, list[Phases]]) -> str:
    """Medians, the median of the ratios of paired runs with the least and the largest, and what is missed."""
    lines = ["| CPU ms | TRL | halfbyte | halfbyte over TRL | spread |", "|---|---|---|---|---|"]
    missed = []
    for phase in found["TRL"][0]:
        theirs, ours = ([run[phase] for run in found[name]] for name in ("TRL", "halfbyte"))
        ratios = [b / a for a, b in zip(theirs, ours, strict=True)]
        missed += [phase] if statistics.median(ratios) > 1 else []
        lines.append(
            f"| {phase} | {statistics.median(theirs) * 1e3:.0f} | {statistics.median(ours) * 1e3:.0f} "
            f"| {statistics.median(ratios):.2f} | {min(ratios):.2f}-{max(ratios):.2f} |"
        )
    return "\n".join(
        [*lines, "", f"The target, no worse than TRL, is missed at: {', '.join(missed) or 'none'}."]
    )


if __name__ == "__main__":
    main()
