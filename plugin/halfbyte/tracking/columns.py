"""The columns of runs side by side: what each is, how far it came, and its figures, the best and the last."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.terminal.wording import count, memory, plural
from halfbyte.tracking.figures import Figure
from halfbyte.tracking.runs import Run
from halfbyte.tracking.series import EVALUATION


@dataclass(frozen=True)
class Column:
    """One column: its name, and the text of each run; ``number`` puts it to the right."""

    name: str
    cells: list[str]
    number: bool = False


@dataclass(frozen=True)
class Evaluated:
    """The values of a figure over the evaluations of one run, of which ``best`` is at ``best_step``.

    ``last`` is None where it was not finite.
    """

    best: float
    best_step: int
    last: float | None
    last_step: int

    def last_text(self, form: str) -> str:
        """The last value in a format; ``nan`` where it was not finite."""
        return "nan" if self.last is None else f"{self.last:{form}}"


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


def evaluated(run: Run, figure: Figure, part: str, *, less: bool) -> Evaluated | None:
    """The best and the last value that ``run`` has of one of :func:`headline`, of equal ones the first.

    None for a recipe that does not compare it, and where there is no finite value.
    """
    points = run.parts(figure.key).get(part) if figure in run.figures.compared else None
    if not points:
        return None
    step, best = (min if less else max)(points, key=lambda point: point[1])
    last = None if run.ended_undefined(figure.key, part) else points[-1][1]
    return Evaluated(best, step, last, points[-1][0])


def headline(runs: Sequence[Run]) -> list[tuple[Figure, str]]:
    """The figures that the recipes of ``runs`` compare, each with an evaluation that has values of it.

    Where no run has an evaluation, the part is ``train``.
    """
    figures = dict.fromkeys(figure for run in runs for figure in run.figures.compared)
    found = {
        (figure, part): None
        for figure in figures
        for run in runs
        if figure in run.figures.compared
        for part in run.parts(figure.key)
    }
    return [each for each in found if each[1] != "train"] or list(found)


def columns(runs: Sequence[Run]) -> list[Column]:
    """Every column, the most important first."""
    name, status, steps, recipe, *others = (
        Column(name, [text(run) or "-" for run in runs], number=name in _NUMBERS)
        for name, (_, text) in PLAIN.items()
    )
    first, *more = _figure_columns(runs) or [[]]
    figures = (column for columns in more for column in columns)
    return [name, *first[:1], status, *first[1:], steps, recipe, *figures, *others]


def _figure_columns(runs: Sequence[Run]) -> list[list[Column]]:
    """For each figure the best value with its step, and the last."""
    found = []
    for figure, part in headline(runs):
        less = is_less_better(figure.key, runs)
        each = [evaluated(run, figure, part, less=less) for run in runs]
        absent = ["nan" if run.ended_undefined(figure.key, part) else "-" for run in runs]
        name, form = f"{part} {figure.label}", figure.form
        best = [f"{e.best:{form}} @{e.best_step}" if e else no for e, no in zip(each, absent, strict=True)]
        last = [e.last_text(form) if e else no for e, no in zip(each, absent, strict=True)]
        both = [Column(f"best {name}", best, number=True), Column(f"last {name}", last, number=True)]
        # The best of noisy rows of training is chance, and of what has no direction there is none.
        found.append(both[1:] if part == "train" or figure.direction == "neither" else both)
    return found


def _steps(run: Run) -> str:
    return f"{run.steps}/{run.total_steps}" if run.total_steps else f"{run.steps}"


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
    "steps": (lambda run: run.steps, _steps),
    "recipe": (lambda run: run.record["recipe"], lambda run: run.record["recipe"]),
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
