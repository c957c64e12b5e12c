"""What was in a batch: the numbers of its rows, found again from the sampler, and its text."""

from itertools import islice
from typing import Any

import torch

MOST_TOKENS = 4096  # of one sequence that are written down


def row_numbers(trainer: Any, count: int, batches: list[Any]) -> list[list[int]] | None:
    """The rows of the last ``count`` micro-batches, counted from 1 in the prepared training set.

    The loader's batch sampler is walked again to where the epoch is, and what it gives is compared with the
    batches. None where that is not possible: a stream, a sampler that draws anew, rows that are packed
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
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return False
    for place, number in enumerate(numbers):
        row = rows[number]
        begin = row.get("input_ids") or row.get("prompt_ids")
        if begin is None:
            return False
        begin = list(begin)[: min(16, ids.shape[1] // 2)]
        held = ids[place].tolist()
        if not any(held[at : at + len(begin)] == begin for at in range(len(held))):  # padded on either side
            return False
    return True


def describe_batch(batch: Any, tokenizer: Any) -> dict[str, Any]:
    """Token ids, text and number of labels of each sequence of a batch, without its padding."""
    if not isinstance(batch, dict) and not hasattr(batch, "items"):
        return {"batch": type(batch).__name__}
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return {"shapes": {key: list(getattr(value, "shape", [])) for key, value in batch.items()}}
    mask = batch.get("attention_mask")
    sequences = []
    for place, row in enumerate(ids):
        kept = row[mask[place].bool()] if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else row
        held = kept[:MOST_TOKENS].tolist()
        described: dict[str, Any] = {"input_ids": held, "cut": len(kept) > MOST_TOKENS}
        if hasattr(tokenizer, "decode"):
            described["text"] = tokenizer.decode(held)
        labels = batch.get("labels")
        if isinstance(labels, torch.Tensor) and labels.shape == ids.shape:
            described["labels"] = int((labels[place] != -100).sum())
        sequences.append(described)
    return {"sequences": sequences}
