"""The columns of runs side by side: what each is, how far it came, and its figures, the best and the last."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.terminal.wording import count, memory, plural
from halfbyte.tracking.figures import Figure
from halfbyte.tracking.runs import Run
from halfbyte.tracking.series import EVALUATION, Points


@dataclass(frozen=True)
class Column:
    """One column: its name, and of each run the value and the text that shows it.

    ``figure`` is the figure whose values these are, if it is one's; ``number`` puts the text to the right.
    """

    name: str
    values: list[Any]
    cells: list[str]
    number: bool = False
    figure: Figure | None = None


@dataclass(frozen=True)
class Evaluated:
    """The values of a figure over the evaluations of one run, of which ``best`` is at ``best_step``."""

    best: float
    best_step: int
    last: float
    last_step: int


def is_less_better(key: str, runs: Sequence[Run]) -> bool:
    """Whether the lesser of two values of ``key`` is the better one.

    ``greater_is_better`` says so for the ``metric_for_best_model`` of a run, else the recipe, else how the name ends.
    """
    key = key.removeprefix(EVALUATION)
    for run in runs:
        given, greater = run.config.get("metric_for_best_model"), run.config.get("greater_is_better")
        if isinstance(given, str) and given.removeprefix(EVALUATION) == key and isinstance(greater, bool):
            return not greater
    known = [figure for run in runs for figure in run.figures.figures if figure.key == key]
    return (known or [Figure(key, key)])[0].direction == "less"


def evaluated(points: Points, *, less: bool) -> Evaluated:
    """The best and the last of ``points``, of equal ones the first."""
    step, best = (min if less else max)(points, key=lambda point: point[1])
    return Evaluated(best, step, points[-1][1], points[-1][0])


def headline(runs: Sequence[Run]) -> list[tuple[Figure, str]]:
    """The figures that the recipes of ``runs`` compare, each with an evaluation that has values of it.

    Where no run has an evaluation, the part is ``train``.
    """
    figures = list(dict.fromkeys(figure for run in runs for figure in run.figures.compared))
    found = {
        (figure, part): None
        for figure in figures
        for run in runs
        if figure in run.figures.compared
        for part in run.evaluations(figure.key)
    }
    return list(found) or [
        (figure, "train") for figure in figures if any(points_of(run, figure, "train") for run in runs)
    ]


def points_of(run: Run, figure: Figure, part: str) -> Points:
    """The points that ``run`` has of one of :func:`headline`, if its recipe compares it."""
    if figure not in run.figures.compared:
        return []
    return run.trained(figure.key) if part == "train" else run.evaluations(figure.key).get(part, [])


def columns(runs: Sequence[Run]) -> list[Column]:
    """Every column, the most important first."""
    plain = {name: Column(name, *_both(runs, *how)) for name, how in PLAIN.items()}
    first, *others = _figure_columns(runs) or [[]]
    order = ["name", "status", "steps", "recipe", "tokens_per_second", "peak_memory", "base", "data"]
    numbers = [
        Column(c.name, c.values, c.cells, number=c.name in _NUMBERS) for c in map(plain.get, order) if c
    ]
    return [
        *(numbers[0], *first[:1], numbers[1], *first[1:], *numbers[2:4]),
        *(column for figure in others for column in figure),
        *numbers[4:],
    ]


def _figure_columns(runs: Sequence[Run]) -> list[list[Column]]:
    """For each figure the best value with its step, and the last."""
    found = []
    for figure, part in headline(runs):
        less = is_less_better(figure.key, runs)
        each = [
            evaluated(points, less=less) if (points := points_of(run, figure, part)) else None for run in runs
        ]
        name, form = f"{part} {figure.label}", figure.form
        last = Column(
            f"last {name}",
            [e and e.last for e in each],
            [f"{e.last:{form}}" if e else "-" for e in each],
            True,
            figure,
        )
        best = Column(
            f"best {name}",
            [e and e.best for e in each],
            [f"{e.best:{form}} @{e.best_step}" if e else "-" for e in each],
            True,
            figure,
        )
        # The best of noisy rows of training is chance, and of what has no direction there is none.
        found.append([last] if part == "train" or figure.direction == "neither" else [best, last])
    return found


def _both(runs: Sequence[Run], value: Callable[[Run], Any], text: Callable[[Run], str | None]) -> Any:
    return [value(run) for run in runs], [text(run) or "-" for run in runs]


def _steps(run: Run) -> str:
    return f"{run.record['steps']}/{run.total_steps}" if run.total_steps else f"{run.record['steps']}"


def _data(run: Run) -> str:
    rows = run.part("data").get("rows")
    return ", ".join([*map(last_name, run.data), *([plural(rows, "row")] if isinstance(rows, int) else [])])


def last_name(name: str) -> str:
    """Of a path the last name; a hub id unchanged."""
    path = name.startswith(("/", "~", ".")) or name.count("/") > 1
    return name.rstrip("/").rpartition("/")[2] if path else name


PLAIN: Mapping[str, tuple[Callable[[Run], Any], Callable[[Run], str | None]]] = {
    "name": (lambda run: run.name, lambda run: run.name),
    "status": (lambda run: run.record["status"], lambda run: run.status),
    "recipe": (lambda run: run.record["recipe"], lambda run: run.record["recipe"]),
    "steps": (lambda run: run.record["steps"], _steps),
    "tokens_per_second": (
        lambda run: run.tokens_per_second,
        lambda run: None if run.tokens_per_second is None else count(run.tokens_per_second),
    ),
    "peak_memory": (
        lambda run: run.peak_memory,
        lambda run: None if run.peak_memory is None else memory(run.peak_memory),
    ),
    "base": (lambda run: run.base, lambda run: run.base and last_name(run.base)),
    "data": (lambda run: ", ".join(run.data) or None, _data),
}
"""The columns of every run by their names: the value, and the text that shows it."""
_NUMBERS = ("steps", "tokens_per_second", "peak_memory")
