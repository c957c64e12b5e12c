"""The one place that changes upstream from outside of its classes, where it offers no method to override.

:mod:`halfbyte.upstream` lists every such place and every private name that is relied on.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TrainingArguments


@contextlib.contextmanager
def without_pickled_arguments() -> Iterator[None]:
    """Keep the Trainer from writing training_args.bin: a pickle of every option, tokens in clear text among them."""
    save = torch.save

    def selective(value: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(value, TrainingArguments):
            save(value, *args, **kwargs)

    torch.save = selective  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.save = save


def wrap_collectives(accelerator: Any, before: Callable[[], None]) -> None:
    """Call ``before`` ahead of each ``gather`` and ``reduce`` of ``accelerator``; ``gather_for_metrics`` gathers."""
    for name in ("gather", "reduce"):
        setattr(accelerator, name, _after(before, getattr(accelerator, name)))


@contextlib.contextmanager
def on_this_rank(accelerator: Any, *, but_the_first: bool = False) -> Iterator[None]:
    """Have ``gather`` and ``gather_for_metrics`` of ``accelerator`` return what this rank has, and wait for none.

    On one process too: in the last step of an epoch ``gather_for_metrics`` cuts every micro-batch to the rows of the
    last one. With ``but_the_first`` its first call is the accelerator's own.
    """
    kept = {name: getattr(accelerator, name) for name in ("gather", "gather_for_metrics")}

    def first(values: Any) -> Any:
        gathered = kept["gather_for_metrics"](values)
        accelerator.gather = accelerator.gather_for_metrics = _as_given
        return gathered

    if but_the_first:
        accelerator.gather_for_metrics = first
    else:
        accelerator.gather = accelerator.gather_for_metrics = _as_given
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(accelerator, name, method)


def _as_given(values: Any) -> Any:
    return values


def _after(before: Callable[[], None], collective: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        return collective(*args, **kwargs)

    return wrapped
