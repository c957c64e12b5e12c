"""The closing summary: what a run has come to, and the commands to go on with."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfbyte.terminal.streams import printable
from halfbyte.terminal.wording import count, memory, say
from halfbyte.tracking.figures import Figures, are_ties
from halfbyte.tracking.suggested import merge_command

# However few lines there are.
_STAYING = ("status", "steps", "weights", "last train loss", "mean train loss", "output")


def show(
    record: Mapping[str, Any],
    output_dir: Path,
    figures: Figures,
    plots: Sequence[Path],
    wandb: str | None,
) -> None:
    """Print the summary of a run: ``record`` is what run.json holds, ``wandb`` the line that W&B adds."""
    total = record["total_steps"]  # None before the first
    rows = [("status", record["status"]), ("steps", f"{record['steps']} of {total}" if total else "0")]
    if "best_checkpoint" in record:
        rows.append(("weights", f"those of {record['best_checkpoint']}, the best"))
    rows += figure_rows(record["metrics"], figures)
    if record["tokens_per_second"]:
        rows.append(("speed", f"{count(record['tokens_per_second'])} tokens/s"))
    peaks = record["peak_memory_bytes"]
    ranks = f", the most of {len(peaks)} ranks" if len(peaks) > 1 else ""
    rows.append(("peak memory", memory(max(peaks)) + ranks + _of_training(record.get("memory", {}))))
    rows.append(("output", os.fspath(output_dir)))
    if plots:
        rows.append(("plots", os.fspath(plots[0].parent / "*.png")))
    config = record["config"]
    merged = record["status"] == "completed" and config.get("use_peft") and not config.get("load_in_8bit")
    merge = merge_command(os.fspath(output_dir)) if merged else None
    commands = [("wandb", wandb), ("merge", merge), ("next", record["next"])]
    print_summary(rows, [(label, line) for label, line in commands if line])


def _of_training(held: Mapping[str, Any]) -> str:
    """What of the peak is the model's and its training's, which a plan predicts; the rest is the process's own."""
    if not held.get("measured"):
        return ""
    return f"; {memory(max(held['measured']))} for training, {memory(held['predicted']['total'])} planned"


def figure_rows(metrics: Mapping[str, Mapping[str, Any]], figures: Figures) -> list[tuple[str, str]]:
    """The last training loss that was logged, however the run ended, and evaluations before and after."""
    rows, train = [], metrics["train"]
    if train.get("loss") is not None:
        rows.append(("last train loss", f"{train['loss']:.4f}"))
    elif train.get("train_loss") is not None:  # no row was logged in between
        rows.append(("mean train loss", f"{train['train_loss']:.4f}"))
    for figure in figures.compared:
        key = f"eval_{figure.key}"
        parts = [metrics[part] for part in ("before", "eval") if metrics[part].get(key) is not None]
        if parts:
            shown = ["ties" if are_ties(part, key) else f"{part[key]:z.4f}" for part in parts]
            rows.append((f"eval {figure.label}", " -> ".join(shown)))
    return rows


def print_summary(rows: Sequence[tuple[str, str]], commands: Sequence[tuple[str, str]]) -> None:
    """Print the closing summary, on a terminal in as many lines as it has.

    ``rows`` are labels with values, ``commands`` labels with lines to copy, which are never wrapped or cut.
    """
    console = Console()
    if sys.stdout.isatty():
        table = Table(show_header=False, box=None, pad_edge=False)
        for label, value in _fitting(rows, commands, console.width, console.height - 2):
            # Before the table folds it: a secret in two lines is not recognized.
            table.add_row(Text(label, style="bold"), Text(printable(value), overflow="fold"))
        console.print()
        console.print(table)
    else:
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            say(f"{label:<{width}}  {value}")
    for label, command in commands:
        say(f"{label}: {command}")


def _fitting(
    rows: Sequence[tuple[str, str]], commands: Sequence[tuple[str, str]], width: int, height: int
) -> list[tuple[str, str]]:
    """``rows`` in ``height`` lines with the ``commands`` under them: the last give way, and are named.

    How the run ended, and where it is, stays.
    """
    kept, left_out = list(rows), list[str]()
    beside = width - max(len(label) for label, _ in rows) - 1
    taken = sum(_lines(f"{label}: {command}", width) for label, command in commands)
    for row in reversed([row for row in rows if row[0] not in _STAYING]):
        if taken + sum(_lines(value, beside) for _, value in kept) + bool(left_out) <= height:
            break
        kept.remove(row)
        left_out.insert(0, row[0])
    return [*kept, ("no room", ", ".join(left_out))] if left_out else kept


def _lines(text: str, width: int) -> int:
    return max(1, -(-len(printable(text)) // max(1, width)))
