"""Weighted means of figures over batches and ranks, each counted once."""

from collections.abc import Callable, Iterable, Mapping

from accelerate.utils import gather_object

_EXTREMES: Mapping[str, Callable[[Iterable[float]], float]] = {"min_reward": min, "max_reward": max}


def means(own: Mapping[str, Iterable[tuple[float, float]]], world_size: int) -> dict[str, float]:
    """What each series of (value, weight) comes to over all ranks, without those that weigh nothing."""
    found = {key: _together(key, pairs) for key, pairs in own.items()}
    ranks = gather_object([found]) if world_size > 1 else [found]
    keys = dict.fromkeys(key for rank in ranks for key in rank)
    totals = {key: _together(key, [rank[key] for rank in ranks if key in rank]) for key in keys}
    return {key: value for key, (value, weight) in totals.items() if weight}


def _together(key: str, pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The weighted mean of (value, weight), or the extreme of what is one, with the sum of the weights."""
    weighing = [(value, weight) for value, weight in pairs if weight]
    total = sum(weight for _, weight in weighing)
    if not total:
        return 0.0, 0.0
    if (extreme := _EXTREMES.get(key)) is not None:
        return extreme(value for value, _ in weighing), total
    return sum(value * weight for value, weight in weighing) / total, total
