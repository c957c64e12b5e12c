"""The save level of a model's layers: the fastest one that fits a memory budget."""

from torch import nn

from halfbyte import distributed
from halfbyte.fast import apart
from halfbyte.fast.layer import LEVELS, FusedForward, fused_layers
from halfbyte.fast.report import Choice
from halfbyte.memory.available import free_bytes
from halfbyte.memory.model import Workload, by_level
from halfbyte.terminal.wording import size_in_bytes


def choose(
    model: nn.Module,
    budget: str,
    workload: Workload,
    *,
    recorded: int | None = None,
    available: int | None = None,
) -> Choice | None:
    """Set the level of every layer of ``model`` that has one to what ``budget`` allows; None where none has.

    ``auto`` plans with ``available`` bytes, by default what is free on the device now; ``min`` recomputes everything; a
    size is what a step may take beside the model. Rank 0 decides for all. ``recorded`` is the level of a checkpoint,
    which is kept.
    """
    layers: list[FusedForward | apart.ApartForward] = [*fused_layers(model), *apart.forwards(model)]
    if not layers:
        return None
    if budget == "min":
        available = None
    elif budget != "auto":
        available = size_in_bytes(budget)
    elif available is None:
        available = free_bytes(next(model.parameters()).device)
    needs = {level: memory.total - memory.loaded for level, memory in by_level(model, workload).items()}
    fitting = [level for level in LEVELS if available is not None and needs[level] <= available]
    level = distributed.agree(max(fitting, default=LEVELS[0])) if recorded is None else recorded
    for each in layers:
        each.level = level
    return Choice(level, budget, available, needs[level], workload.tokens, recorded is not None)
