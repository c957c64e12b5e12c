"""Series of points from the rows of metrics.jsonl: by figure, of training and of each evaluation."""

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, TypeGuard

from halfbyte.tracking.figures import are_ties
from halfbyte.tracking.rows import Row

Points = list[tuple[int, float]]
Series = dict[tuple[str, str], Points]

EVALUATION = "eval_"
"""How the names of an evaluation's figures begin."""
_NO_FIGURES = ("step", "time")
_MOST = 1e300


def curves(rows: Sequence[Row], keys: Sequence[str]) -> Series:
    """Points by (key, "train" or the evaluation's name), in the order of `keys`, training first.

    Of rows with one step the last counts: a resumed run repeats steps. Ties are no points of a preference accuracy. A
    key that begins with ``eval_`` has the points of that name alone.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    own = {name for row in rows for name in row if not name.startswith(EVALUATION)}
    for key in keys:
        # Evaluation on several data sets logs eval_NAME_loss; eval_aux_loss is another figure's, which training logs.
        evaluation = re.compile(rf"eval_(?:(.+)_)?{re.escape(key)}")
        found[key, "train"] = {}
        for row in rows:
            for name, value in row.items():
                if not name.endswith(key) or not is_number(value):
                    continue
                if are_ties(row, name):
                    continue
                if name == key:
                    part = "eval" if key.startswith(EVALUATION) else "train"
                    found.setdefault((key, part), {})[row["step"]] = value
                elif (match := evaluation.fullmatch(name)) and (name == f"eval_{key}" or name[5:] not in own):
                    part = f"eval {match[1]}" if match[1] else "eval"
                    found.setdefault((key, part), {})[row["step"]] = value
    return {name: sorted(points.items()) for name, points in found.items() if points}


def names(rows: Iterable[Row]) -> list[str]:
    """The names under which ``rows`` have numbers, in the order in which they come."""
    return list(
        dict.fromkeys(
            key for row in rows for key, value in row.items() if is_number(value) and key not in _NO_FIGURES
        )
    )


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether ``value`` can be drawn: a finite number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST


def columns(points: Points) -> tuple[list[int], list[float]]:
    """The steps of ``points``, and their values."""
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """The running mean in which a value so many places away, before or after, has ``weight`` to that power.

    One that looks back only lags behind, and shows training as worse than it is. It looks no further ahead than back,
    so that the line begins where the values do.
    """
    sums, shares = _decayed(values, weight), _decayed([1.0] * len(values), weight)
    return [total / share for total, share in zip(sums, shares, strict=True)]


def _decayed(values: Sequence[float], weight: float) -> list[float]:
    back = list(accumulate(values, lambda total, value: weight * total + value))
    ahead = [*list(accumulate(reversed(values), lambda total, value: weight * total + value))[::-1], 0.0]
    found = []
    for place, value in enumerate(values):
        beyond = min(2 * place + 1, len(values))
        found.append(back[place] + ahead[place] - weight ** (beyond - place) * ahead[beyond] - value)
    return found


def usual_weight(points: Points) -> float:
    """The weight of the running mean that a line of so many points gets: 0 for few, which are drawn as they are."""
    return min(0.95, 1 - 20 / len(points)) if len(points) > 100 else 0.0
