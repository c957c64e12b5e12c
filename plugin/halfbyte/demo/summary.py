"""What the demo shows at its end: figures of the three runs, and sample completions."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_SAMPLES = 3
_NEW_TOKENS = 24
_TIE = 1e-6


def figures(directory: Path) -> list[tuple[str, str, str]]:
    """Rows of (figure, before, after), read from the three ``run.json``; the last ones have no "before"."""
    runs = {name: json.loads((directory / name / "run.json").read_text()) for name in ("base", "sft", "dpo")}
    before, after = (
        {name: run["metrics"][part] for name, run in runs.items()} for part in ("before", "eval")
    )
    base = runs["sft"]["base"]
    embeddings = base.get("left_out_bytes", {}).get("embeddings")
    kept = f", of which embeddings not in 4 bits {_megabytes(embeddings)}" if embeddings else ""
    return [
        ("base: held-out loss", *(f"{part['base']['eval_loss']:.3f}" for part in (before, after))),
        ("SFT: held-out loss", *(f"{part['sft']['eval_loss']:.3f}" for part in (before, after))),
        ("DPO: held-out preference accuracy", *(_accuracy(part["dpo"]) for part in (before, after))),
        (
            "DPO: held-out reward margin",
            *(f"{part['dpo']['eval_rewards/margins']:.3f}" for part in (before, after)),
        ),
        ("base in 16 bits", "", _megabytes(base["bytes_16bit"])),
        ("base in NF4, double quantization", "", _megabytes(base["bytes_4bit"]) + kept),
        *(
            (f"{name}: peak memory of a process", "", _megabytes(max(run["peak_memory_bytes"])))
            for name, run in runs.items()
        ),
    ]


def _accuracy(metrics: dict[str, float]) -> str:
    """At the start the policy is the reference, so that no pair has a winner: that is no accuracy of 0."""
    if abs(metrics["eval_rewards/margins"]) < _TIE:
        return "none (all tied)"
    return f"{metrics['eval_rewards/accuracies']:.3f}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def samples(directory: Path) -> list[tuple[str, dict[str, str]]]:
    """For three held-out signatures: what base, SFT and DPO model write, greedily, and the real docstring."""
    import torch
    from accelerate import PartialState
    from transformers import AutoTokenizer

    from halfbyte import QLoRAPlugin

    PartialState(cpu=True)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(directory / "base")
    plugin = QLoRAPlugin(adapter_name_or_path=str(directory / "sft"), dtype="float32")
    model: Any = plugin.load(str(directory / "base"), gradient_checkpointing=False)
    model.load_adapter(str(directory / "dpo"), adapter_name="dpo")
    model.eval()

    def complete(prompt: list[dict[str, str]]) -> str:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=_NEW_TOKENS, do_sample=False, repetition_penalty=1.2
            )
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return " ".join(str(text).split())

    shown = []
    with (directory / "data" / "sft" / "test.jsonl").open(encoding="utf-8") as file:
        for line, _ in zip(file, range(_SAMPLES), strict=False):
            row = json.loads(line)
            answers = {"really": row["completion"][0]["content"]}
            with model.disable_adapter():
                answers["base"] = complete(row["prompt"])
            for name, adapter in (("SFT", "default"), ("DPO", "dpo")):
                model.set_adapter(adapter)
                answers[name] = complete(row["prompt"])
            shown.append((row["prompt"][0]["content"], answers))
    return shown


def show(directory: Path, console: Console) -> None:
    """Print figures, samples, and where everything is."""
    with console.status("sampling from base, SFT and DPO"):
        completions = samples(directory)
    table = Table("", "before", "after", title="held out: modules of the standard library not trained on")
    for row in figures(directory):
        table.add_row(*row)
    console.print(table)
    for signature, answers in completions:
        console.print(signature, style="bold", markup=False, highlight=False)
        for name, text in answers.items():
            console.print(f"  {name:<6}  {text}", markup=False, highlight=False)
    console.print(f"plots: {directory}/sft/plots, {directory}/dpo/plots", highlight=False, soft_wrap=True)
