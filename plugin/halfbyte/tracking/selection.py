"""Which runs are shown, and in which order: by a column, a figure or an option."""

import json
from collections.abc import Sequence
from typing import Any

from halfbyte.errors import UserError
from halfbyte.terminal.wording import shorten, suggestion
from halfbyte.tracking.columns import PLAIN, headline, is_less_better, last_name
from halfbyte.tracking.runs import Run
from halfbyte.tracking.series import EVALUATION, names

_MOST_FIRST = ("steps", "tokens_per_second")


def ordered(runs: Sequence[Run], key: str) -> tuple[list[Run], str]:
    """``runs`` with the best by ``key`` first, and in words how; runs without a value come last.

    ``key`` is a column, a figure, of which an evaluation's best value counts and else the last of training, or an
    option. Raises :class:`UserError` for anything else.
    """
    logged = dict.fromkeys(name for run in runs for name in names(run.rows))
    options = dict.fromkeys(name for run in runs for name in run.config)
    key = key if key in (*logged, *PLAIN) else key.replace("-", "_")
    if key in PLAIN:
        values = [PLAIN[key][0](run) for run in runs]
        most = key in _MOST_FIRST
    elif key in options:  # before figures: what is logged of the learning rate is how it ended
        values, most = [run.config.get(key) for run in runs], False
    elif key in logged or f"{EVALUATION}{key}" in logged:
        key = f"{EVALUATION}{key}" if f"{EVALUATION}{key}" in logged else key
        less = is_less_better(key, runs)
        values, most = [_figure_value(run, key, less=less) for run in runs], not less
    else:
        known = dict.fromkeys([*PLAIN, *logged, *options])
        raise UserError(
            f"no column, figure or option is named {shorten(key)!r}{suggestion(key, known, 2)}\n"
            f"  columns: {', '.join(PLAIN)}\n"
            f"  figures, among others: {', '.join(_headline(runs)) or 'none'}",
            option="--sort",
        )
    known_first = [pair for pair in zip(runs, values, strict=True) if pair[1] is not None]
    known_first.sort(key=lambda pair: _sortable(pair[1]), reverse=most)
    without = [run for run, value in zip(runs, values, strict=True) if value is None]
    return [
        *(run for run, _ in known_first),
        *without,
    ], f"by {key}, the {'greatest' if most else 'least'} first"


def _headline(runs: Sequence[Run]) -> list[str]:
    parts = {figure.key: part for figure, part in headline(runs)}
    return [key if part == "train" else f"{EVALUATION}{key}" for key, part in parts.items()]


def _figure_value(run: Run, key: str, *, less: bool) -> float | None:
    parts = run.parts(key)
    if points := parts.get("eval"):
        return (min if less else max)(value for _, value in points)
    return parts["train"][-1][1] if "train" in parts else None


def _sortable(value: Any) -> tuple[int, float, str]:
    """Numbers by their size, before anything else by its text."""
    if isinstance(value, int | float):
        return 0, value, ""
    return 1, 0.0, value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def selected(runs: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """The runs for which every ``key=value`` holds: a column, or an option as the YAML spells it.

    Raises :class:`UserError` for a key that no run has.
    """
    options = dict.fromkeys(name for run in runs for name in run.config)
    for condition in conditions:
        key, equals, wanted = condition.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UserError(f"{shorten(condition)!r} is not written key=value", option="--where")
        if key not in PLAIN and key not in options:
            known = dict.fromkeys([*PLAIN, *options])
            raise UserError(
                f"no column or option is named {shorten(key)!r}{suggestion(key, known, 2)}", option="--where"
            )
        runs = [run for run in runs if any(_is(value, wanted) for value in _shown_as(run, key))]
    return list(runs)


def _shown_as(run: Run, key: str) -> list[Any]:
    """What a user may write for the value of ``key``: of a path its last name too."""
    if key not in PLAIN:
        return [run.config.get(key)]
    value, text = (read(run) for read in PLAIN[key])
    return [value, text, *run.data, *map(last_name, run.data)] if key == "data" else [value, text]


def _is(value: Any, wanted: str) -> bool:
    if isinstance(value, bool) or value is None:
        return (
            wanted.lower()
            in {True: ("true", "yes"), False: ("false", "no"), None: ("null", "none", "")}[value]
        )
    if isinstance(value, int | float):
        try:
            return float(wanted) == value
        except ValueError:
            return False
    return wanted in (value, last_name(str(value))) or (
        not isinstance(value, str) and wanted.replace(" ", "") == _json(value)
    )


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
