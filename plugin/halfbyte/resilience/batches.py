"""What was in a batch: the numbers of its rows, found again from the sampler, and its text."""

import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from halfbyte.files import replace_file

MOST_TOKENS = 4096  # of one sequence that are written down


def row_numbers(trainer: Any, count: int, batches: list[Any]) -> list[list[int]] | None:
    """The rows of the last ``count`` micro-batches, counted from 1 in the prepared training set.

    The loader's batch sampler is walked again to where the epoch is, and what it gives is compared with the
    batches. None where that is not possible: a stream, a sampler that draws again, rows that are packed
    as they come.
    """
    loader: Any = getattr(trainer.callback_handler, "train_dataloader", None)
    sampler, rows = getattr(loader, "batch_sampler", None), trainer.train_dataset
    if sampler is None or not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
        return None
    per_epoch = len(loader)
    per_step = trainer.args.gradient_accumulation_steps
    steps = -(-per_epoch // per_step)
    start = (trainer.state.global_step % steps) * per_step
    try:
        with torch.random.fork_rng(devices=[]):  # a sampler may draw: the run must not notice
            batches_of_rows = islice(iter(sampler), start, start + count)
            found = [[int(number) for number in batch] for batch in batches_of_rows]
        if len(found) != count or not all(map(_same, [rows] * count, found, batches)):
            return None
    except Exception:  # a sampler of someone else's
        return None
    return [[number + 1 for number in batch] for batch in found]


def _same(rows: Any, numbers: list[int], batch: Any) -> bool:
    """Whether a batch begins each of its sequences as the rows do."""
    held = _sequences(batch)
    if held is None or len(held) < len(numbers):
        return False
    for number, (ids, _) in zip(numbers, held, strict=False):
        row = rows[number]
        begin = row.get("input_ids") or row.get("prompt_ids")
        if begin is None:
            return False
        begin, tokens = list(begin)[: max(1, min(16, len(ids) // 2))], ids.tolist()
        # Padding may stand on either side.
        if not any(tokens[at : at + len(begin)] == begin for at in range(len(tokens))):
            return False
    return True


def _sequences(batch: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]] | None:
    """Token ids and labels of each sequence of a batch; one without padding is parted where positions restart."""
    ids = batch.get("input_ids") if hasattr(batch, "get") else None
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return None
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.shape != ids.shape:
        labels = None
    positions = batch.get("position_ids")
    if len(ids) == 1 and isinstance(positions, torch.Tensor) and positions.shape == ids.shape:
        begins = [*(positions[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        pieces = [slice(begin, end) for begin, end in pairwise(begins)]
        return [(ids[0, piece], None if labels is None else labels[0, piece]) for piece in pieces]
    mask = batch.get("attention_mask")
    masked = isinstance(mask, torch.Tensor) and mask.shape == ids.shape
    return [
        (row[mask[place].bool()] if masked else row, None if labels is None else labels[place])
        for place, row in enumerate(ids)
    ]


def describe_batch(batch: Any, tokenizer: Any) -> dict[str, Any]:
    """Token ids, text and number of labels of each sequence of a batch, without its padding."""
    if not isinstance(batch, dict) and not hasattr(batch, "items"):
        return {"batch": type(batch).__name__}
    held = _sequences(batch)
    if held is None:
        return {"shapes": {key: list(getattr(value, "shape", [])) for key, value in batch.items()}}
    sequences = []
    for ids, labels in held:
        kept = ids[:MOST_TOKENS].tolist()
        described: dict[str, Any] = {"input_ids": kept, "cut": len(ids) > MOST_TOKENS}
        if hasattr(tokenizer, "decode"):
            described["text"] = tokenizer.decode(kept)
        if labels is not None:
            described["labels"] = int((labels != -100).sum())
        sequences.append(described)
    return {"sequences": sequences}


def describe_micro_batches(
    batches: list[Any], losses: list[torch.Tensor], rows: list[list[int]] | None, tokenizer: Any
) -> list[dict[str, Any]]:
    """Loss, row numbers and text of each micro-batch of a step."""
    return [
        {
            "loss": str(float(loss)),
            "rows": None if rows is None else rows[number],
            **describe_batch(batch, tokenizer),
        }
        for number, (batch, loss) in enumerate(zip(batches, losses, strict=True))
    ]


def write_batch(path: Path, content: dict[str, Any]) -> Path:
    """Write ``content`` to ``path`` as JSON and return the path."""
    replace_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    return path
