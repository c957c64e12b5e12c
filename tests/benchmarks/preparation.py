"""Measure what comes before the first step against TRL: `python -m tests.benchmarks.preparation [--write]`.

From a file of rows to rows that can be trained on: TRL reads and prepares them, halfbyte also checks, hashes and counts
them. Each in a process of its own that has imported and warmed up, in turn, with an empty cache; TRL with its default
`dataset_num_proc`. Memory is anonymous (RssAnon), summed over all processes that prepare.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="disabled")

import datasets
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DatasetMixtureConfig, DPOConfig, DPOTrainer, ScriptArguments, SFTConfig, SFTTrainer

from halfbyte import data
from halfbyte.demo import corpus
from halfbyte.demo.tokenizer import train_tokenizer
from tests.benchmarks import machine, results

VOCABULARY = 16_384
KINDS = {
    "sft": (SFTTrainer, SFTConfig, data.Text),
    "dpo": (DPOTrainer, DPOConfig, data.PreferencePairs),
}
TARGET, MEMORY_TARGET = 3.0, 200  # times TRL's rows per second; MiB more than with the fewest rows
JOB = (
    "Four messages a row, of which the last is the completion for DPO (about 280 tokens a side; byte-level BPE, 16k "
    "tokens), from a JSON Lines file to prepared rows, wall time; `max_length` 1024 cuts none of them."
)

Found = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-rows", type=int, nargs=2, default=(20_000, 500_000))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    parser.add_argument("--one", nargs=3, metavar=("WHO", "KIND", "FILE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(prepare(*asked.one)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_tokenizer(folder)
        speed = compare(folder, asked.kinds, asked.rows, asked.repeats)
        memory = [anonymous(folder, kind, asked.memory_rows) for kind in asked.kinds]
    text = f"{speed}\n\n" + "\n".join([MEMORY_HEADER, *memory])
    print(text)
    if asked.write:
        about = machine.run("preparation", sys.argv[1:], f"{asked.repeats} runs of each, {asked.rows:,} rows")
        results.write(f"{results.PREPARATION}\n\n{about} {JOB}\n\n{text}")


MEMORY_HEADER = "| memory, MiB | fewer rows | more rows | growth | target | met |\n|---|---|---|---|---|---|"


def compare(folder: Path, kinds: list[str], rows: int, repeats: int) -> str:
    """Both in turn, as a table."""
    lines = [
        "| rows | TRL rows/s | halfbyte rows/s | x TRL | spread | CPU s, TRL and halfbyte | CPU s, ratio | target "
        "| met |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        file = write_rows(folder, kind, rows)
        pairs = [[run(who, kind, file)[0] for who in ("trl", "halfbyte")] for _ in range(repeats)]
        ratios = [trl["seconds"] / ours["seconds"] for trl, ours in pairs]
        rates = [statistics.median(rows / pair[at]["seconds"] for pair in pairs) for at in (0, 1)]
        cpu = [statistics.median(pair[at]["cpu"] for pair in pairs) for at in (0, 1)]
        ratio = statistics.median(ratios)
        lines.append(
            f"| {kind} | {rates[0]:.0f} | {rates[1]:.0f} | {ratio:.2f} | {min(ratios):.2f}-{max(ratios):.2f} "
            f"| {cpu[0]:.1f}, {cpu[1]:.1f} | {cpu[0] / cpu[1]:.2f} "
            f"| >= {TARGET}x | {'yes' if ratio >= TARGET else 'NO'} |"
        )
    return "\n".join(lines)


def anonymous(folder: Path, kind: str, sizes: tuple[int, int]) -> str:
    """The peak memory of halfbyte's preparation with fewer and with more rows, as a line of a table."""
    peaks = [run("halfbyte", kind, write_rows(folder, kind, rows))[1] for rows in sizes]
    growth = peaks[1] - peaks[0]
    met = "yes" if growth <= MEMORY_TARGET else "NO"
    return (
        f"| {kind}, {sizes[0]:,} and {sizes[1]:,} rows | {peaks[0]:.0f} | {peaks[1]:.0f} | {growth:.0f} "
        f"| <= {MEMORY_TARGET} | {met} |"
    )


def run(who: str, kind: str, file: Path) -> tuple[Found, float]:
    """One preparation in a process of its own: its times, and the peak of RssAnon over its processes in MiB."""
    command = [sys.executable, "-m", "tests.benchmarks.preparation", "--one", who, kind, str(file)]
    with (
        tempfile.TemporaryDirectory(dir=file.parent) as cache,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_DATASETS_CACHE": cache},
        ) as process,
    ):
        peak, over = 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.2):
                peak = max(peak, resident(process.pid))

        watching = threading.Thread(target=watch)
        watching.start()
        said = process.communicate()[0]
        over.set()
        watching.join()
    assert process.returncode == 0, said
    return json.loads(said.splitlines()[-1]), peak


def resident(pid: int) -> float:
    """RssAnon of a process and its descendants, MiB; what a fork shares with its parent counts twice."""
    total = 0.0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                total += int(line.split()[1]) / 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(resident(int(child)) for child in (task / "children").read_text().split())
    return total


def prepare(who: str, kind: str, file: str) -> Found:
    """Prepare the rows of ``file`` after a few others to warm up; wall and CPU seconds, those of children too."""
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    few = Path(file).with_suffix(".few.jsonl")
    with Path(file).open(encoding="utf-8") as lines:
        few.write_text("".join(itertools.islice(lines, 8)), encoding="utf-8")
    times = []
    for path in (str(few), file):
        begin, before = time.perf_counter(), sum(os.times()[:4])
        PREPARE[who](kind, path)
        times.append({"seconds": time.perf_counter() - begin, "cpu": sum(os.times()[:4]) - before})
    return times[-1]


def trl(kind: str, file: str) -> None:
    """As `trl sft` and `trl dpo` do."""
    trainer_cls, _, _ = KINDS[kind]
    rows = datasets.load_dataset("json", data_files=file, split="train")
    trainer_cls(train_dataset=rows, **shared(kind, file))


def halfbyte(kind: str, file: str) -> None:
    """As a run does; its lines of progress go to standard output, before the result."""
    trainer_cls, _, format = KINDS[kind]
    given = shared(kind, file)
    script, mixture = ScriptArguments(dataset_name=file), DatasetMixtureConfig()
    rows = data.load(script, mixture, given["args"], format, given["processing_class"])
    trainer = data.counted(trainer_cls, rows.report)(train_dataset=rows.train, **given)
    data.check_labels(trainer, rows.report)


PREPARE = {"trl": trl, "halfbyte": halfbyte}


def shared(kind: str, file: str) -> dict[str, object]:
    """What both trainers are given besides their rows: a model of next to nothing."""
    folder = Path(file).parent
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape)
    args = KINDS[kind][1](
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
    )
    models = {"model": LlamaForCausalLM(config)}
    if kind == "dpo":
        models["ref_model"] = LlamaForCausalLM(config)
    return {**models, "args": args, "processing_class": tokenizer}


def make_tokenizer(folder: Path) -> None:
    texts = [text.text for text in corpus.collect().texts[:300]]
    train_tokenizer(texts, vocabulary=VOCABULARY).save_pretrained(folder / "tokenizer")


def write_rows(folder: Path, kind: str, rows: int) -> Path:
    """Conversations of four messages out of docstrings, written once."""
    path = folder / f"{kind}-{rows}.jsonl"
    if path.exists():
        return path
    draw = random.Random(7)
    said = [pair.docstring for pair in corpus.collect().pairs]

    def turn(role: str, least: int, most: int) -> dict[str, str]:
        text, wanted = "", draw.randint(least, most)
        while len(text) < wanted:
            text += draw.choice(said) + " "
        return {"role": role, "content": text[:wanted]}

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            asked = [turn("user", 80, 300), turn("assistant", 150, 600), turn("user", 80, 300)]
            row = {"messages": [*asked, turn("assistant", 150, 600)]}
            if kind == "dpo":
                sides = {name: [turn("assistant", 150, 600)] for name in ("chosen", "rejected")}
                row = {"prompt": asked, **sides}
            file.write(json.dumps(row) + "\n")
    return path


if __name__ == "__main__":
    main()
