"""What the demo shows at its end: figures of the three runs, and sample completions."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RUNS = ("base", "sft", "dpo")
_SAMPLES = 3
_GREEDY = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.2}
_TIE = 1e-6


def figures(directory: Path) -> list[tuple[str, str, str]]:
    """Rows of (figure, before, after), read from the three ``run.json``."""
    runs = {name: json.loads((directory / name / "run.json").read_text()) for name in RUNS}
    metrics = {name: (run["metrics"]["before"], run["metrics"]["eval"]) for name, run in runs.items()}

    def row(label: str, name: str, figure: Callable[[dict[str, float]], str]) -> tuple[str, str, str]:
        before, after = metrics[name]
        return label, figure(before), figure(after)

    def loss(part: dict[str, float]) -> str:
        return f"{part['eval_loss']:.3f}"

    return [
        row("base: loss", "base", loss),
        row("SFT: loss", "sft", loss),
        row("DPO: preference accuracy", "dpo", _accuracy),
        row("DPO: reward margin", "dpo", lambda part: f"{part['eval_rewards/margins']:.3f}"),
    ]


def sizes(directory: Path) -> list[str]:
    """Lines on the bytes of the base and on the memory of the runs."""
    runs = {name: json.loads((directory / name / "run.json").read_text()) for name in RUNS}
    base = runs["sft"]["base"]
    wide, four = sum(base["left_out_bytes"].values()), base["bytes_4bit"]
    peaks = ", ".join(f"{name} {_megabytes(max(run['peak_memory_bytes']))}" for name, run in runs.items())
    return [
        f"weights of the base: {_megabytes(base['bytes_16bit'])} in 16 bits; {_megabytes(four)} in NF4 with "
        f"double quantization, {_megabytes(wide)} of them the embeddings and norms, left in float32",
        f"peak memory of a process: {peaks}",
    ]


def _accuracy(metrics: dict[str, float]) -> str:
    """At the start the policy is the reference, so that no pair has a winner: that is no accuracy of 0."""
    if abs(metrics["eval_rewards/margins"]) < _TIE:
        return "all tied"
    return f"{metrics['eval_rewards/accuracies']:.3f}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def samples(directory: Path) -> list[tuple[str, dict[str, str]]]:
    """For three held-out signatures: what base, SFT and DPO model write, greedily, and the real docstring."""
    import torch
    from accelerate import PartialState
    from transformers import AutoTokenizer
    from transformers.utils import logging as hugging_face

    from halfbyte import QLoRAPlugin

    PartialState(cpu=True)
    torch.set_num_threads(1)
    hugging_face.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # deprecations between upstream's own parts
    tokenizer = AutoTokenizer.from_pretrained(directory / "base")
    plugin = QLoRAPlugin(adapter_name_or_path=str(directory / "sft"), dtype="float32")
    model: Any = plugin.load(str(directory / "base"), gradient_checkpointing=False)
    model.load_adapter(str(directory / "dpo"), adapter_name="dpo")
    model.eval()

    shown = []
    with (directory / "data" / "sft" / "test.jsonl").open(encoding="utf-8") as file:
        for line, _ in zip(file, range(_SAMPLES), strict=False):
            row = json.loads(line)
            answers = {"really": row["completion"][0]["content"]}
            with model.disable_adapter():
                answers["base"] = completion(model, tokenizer, row["prompt"])
            for name, adapter in (("SFT", "default"), ("DPO", "dpo")):
                model.set_adapter(adapter)
                answers[name] = completion(model, tokenizer, row["prompt"])
            shown.append((row["prompt"][0]["content"], answers))
    return shown


def completion(model: Any, tokenizer: Any, prompt: list[dict[str, str]]) -> str:
    """What ``model`` writes after ``prompt``, greedily, on one line."""
    import torch

    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**inputs, **_GREEDY)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(str(text).split())


def show(directory: Path, console: Console) -> None:
    """Print figures, samples, and where everything is."""
    with console.status("sampling from base, SFT and DPO"):
        completions = samples(directory)
    table = Table("", "before", "after", title="on modules not trained on")
    for row in figures(directory):
        table.add_row(*row)
    console.print(table)
    for signature, answers in completions:
        console.print(signature, style="bold", markup=False, highlight=False, soft_wrap=True)
        for name, text in answers.items():
            console.print(f"  {name:<6}  {text}", markup=False, highlight=False, soft_wrap=True)
    for line in sizes(directory):
        console.print(line, highlight=False, soft_wrap=True)
    for name in RUNS:
        console.print(f"plots: {directory / name / 'plots'}", highlight=False, soft_wrap=True)
