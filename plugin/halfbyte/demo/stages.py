"""The demo's training runs: data and configuration written out, then started as a user would start them."""

import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from halfbyte.demo import corpus
from halfbyte.demo.corpus import Corpus

_PROGRESS = re.compile(r"step \d+/\d+\b.*")
_TAIL_LINES = 25


@dataclass(frozen=True)
class Size:
    """How much the demo trains; tests make it small."""

    base_steps: int = 300
    sft_steps: int = 120
    dpo_steps: int = 50
    held_out_rows: int = 128


class StageFailed(Exception):  # noqa: N818 - it says what happened; no caller treats it as our error
    """A training process ended with a status other than 0."""

    def __init__(self, name: str, log: Path, status: int) -> None:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        super().__init__("\n".join([*tail, f"demo: {name} failed with status {status}; its log is {log}"]))
        self.status = status


def base_training(size: Size) -> dict[str, Any]:
    """`pretrain` with all parameters, from random weights."""
    return {
        **_common(size.base_steps, batch=8, max_length=128),
        "load_in_4bit": False,
        "use_peft": False,
        "learning_rate": 2.5e-3,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "save_strategy": "no",
    }


def sft_training(size: Size) -> dict[str, Any]:
    """`sft` in QLoRA: NF4 with double quantization and adapters on all linear layers are the defaults."""
    return {**_common(size.sft_steps, batch=8, max_length=256), "learning_rate": 4.0e-3}


def dpo_training(size: Size) -> dict[str, Any]:
    """`dpo` from the SFT adapter, which is the reference as well."""
    return {**_common(size.dpo_steps, batch=8, max_length=256), "learning_rate": 4.0e-4, "beta": 0.1}


def _common(steps: int, *, batch: int, max_length: int) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 16,
        "max_length": max_length,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": steps,
        "save_strategy": "steps",
        "save_steps": steps,
        "logging_steps": 10,
        "gradient_checkpointing": False,  # time is scarcer here than memory
        "dtype": "float32",  # at this size faster than bfloat16 on every CPU
        "use_cpu": True,
        "report_to": "none",
        "seed": 0,
    }


def write_data(source: Corpus, directory: Path, size: Size) -> None:
    """Write ``text``, ``sft`` and ``dpo`` data, each with a train and a test file; no module is in both."""
    generator = random.Random(0)
    parts = {"train": False, "test": True}
    for part, is_test in parts.items():
        texts = [text.text for text in source.texts if corpus.held_out(text.module) == is_test]
        pairs = [pair for pair in source.pairs if corpus.held_out(pair.module) == is_test]
        generator.shuffle(pairs)
        if is_test:
            texts = [text[:3000] for text in texts[: size.held_out_rows]]
            pairs = pairs[: size.held_out_rows]
        _write_rows(directory / "text" / f"{part}.jsonl", ({"text": text} for text in texts))
        _write_rows(directory / "sft" / f"{part}.jsonl", corpus.prompt_completions(pairs))
        _write_rows(directory / "dpo" / f"{part}.jsonl", corpus.preferences(pairs))


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def train(name: str, recipe: str, configuration: dict[str, Any], directory: Path, console: Console) -> None:
    """Run ``recipe`` on two processes with ``directory``/``name``.yaml; its output goes to ``name``.log.

    Raises `StageFailed` with the end of the log when it does not succeed.
    """
    config = directory / f"{name}.yaml"
    config.write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")
    log = directory / f"{name}.log"
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    strategy = ["--config_file", str(files("halfbyte") / "launch" / "cpu.yaml"), "--main_process_port", "0"]
    program = ["-m", "halfbyte", recipe, "--config", str(config)]
    shown = shlex.join(["accelerate", "launch", *strategy[:2], *program])
    console.print(f"{name}: {shown}", style="bold", highlight=False, markup=False, soft_wrap=True)
    started = time.monotonic()
    status = _follow([*launcher, *strategy, *program], log, name, console)
    if status != 0:
        raise StageFailed(name, log, status)
    console.print(f"{name}: done in {time.monotonic() - started:.0f} s", highlight=False)


def _follow(command: list[str], log: Path, name: str, console: Console) -> int:
    """Run ``command``, keep all it prints in ``log``, show its progress, and return its exit status."""
    # One thread a process: on few cores, small products run up to ten times faster so.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with (
        log.open("w", encoding="utf-8") as file,
        console.status(f"{name}: starting two processes") as live,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                file.write(line)
                file.flush()
                if found := _PROGRESS.match(line.strip()):
                    if console.is_terminal:
                        live.update(f"{name}: {found[0]}")
                    else:
                        console.print(f"{name}: {found[0]}", markup=False, highlight=False, soft_wrap=True)
            return child.wait()
        except BaseException:
            child.terminate()  # the launcher stops its two processes
            raise
