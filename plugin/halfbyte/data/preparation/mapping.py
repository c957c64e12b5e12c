"""A pass over the rows of a Dataset that makes new ones, by several processes, cached."""

import os
from collections.abc import Callable
from typing import Any

from accelerate import PartialState

ROWS = 250  # in a batch
LEAST = 1000  # rows for which a process is worth its start


def workers(given: int | None, rows: int) -> int | None:
    """How many processes prepare ``rows``: as given, else the cores of this rank; None stands for this one alone."""
    if given is None:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        given = min(len(os.sched_getaffinity(0)) // ranks, rows // LEAST)
    return given if given > 1 else None


def mapped(label: str, dataset: Any, function: Callable[..., Any], num_proc: int | None = None) -> Any:
    """A Dataset as ``function`` changes it, made once for all ranks that share a cache.

    A function with ``features`` takes batches with the indices of their rows, of ``rows`` of them where it says so; any
    other takes one row. The rows and their order do not depend on ``num_proc``.
    """
    state = PartialState()
    options: dict[str, Any] = {"desc": label, "num_proc": num_proc}
    if (features := getattr(function, "features", None)) is not None:
        options |= {"batched": True, "batch_size": getattr(function, "rows", ROWS), "with_indices": True}
        options["features"] = features(dataset.features)
    # As TRL does: the first process of all, then that of each node, then the others, which read what those wrote.
    with state.main_process_first(), state.local_main_process_first():
        return dataset.map(function, **options)
