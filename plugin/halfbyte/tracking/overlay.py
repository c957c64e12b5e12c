"""Curves of several runs in one picture: a panel a figure, a colour a run, each named where its line ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from halfbyte.errors import UserError
from halfbyte.terminal.redaction import redact
from halfbyte.terminal.wording import shorten, suggestion
from halfbyte.tracking.columns import headline
from halfbyte.tracking.drawing import (
    DARK,
    LIGHT,
    Theme,
    apart,
    bound,
    canvas,
    chance_line,
    dress,
    encoded,
    evaluation_line,
    training_line,
)
from halfbyte.tracking.figures import Plot
from halfbyte.tracking.runs import Run
from halfbyte.tracking.series import EVALUATION, Series, curves, names, usual_weight

_WIDTH, _ALONE = 5.4, 8.0  # inches of a panel, beside another and alone
_HEIGHT, _HEIGHT_ALONE = 3.3, 4.2
_TOP, _LEFT, _BOTTOM, _ABOVE = 0.4, 0.78, 0.55, 0.34  # inches: above all; left of, under and above each panel
_LABEL = 9.5  # points of a run's name
_LONGEST = 28  # characters of it
_OF_TIME = ("runtime", "per_second", "flos", "epoch", "num_tokens")  # the names that are not listed
_MARKERS = "os^D"  # of several evaluations


@dataclass(frozen=True)
class Panel:
    """One figure: how it is drawn, and of each run that has it the series."""

    plot: Plot
    of: dict[str, Series] = field(default_factory=dict)


def panels(runs: Sequence[Run], metrics: Sequence[str]) -> tuple[list[Panel], list[str]]:
    """The panels of ``metrics``, and a line for each that not all runs have; unset, those that the recipes compare.

    ``loss`` is drawn of training and of evaluations, ``eval_loss`` of evaluations. Raises :class:`UserError` for a
    name that no run has.
    """
    shown = metrics or list(dict.fromkeys(figure.key for figure, _ in headline(runs)))
    logged = dict.fromkeys(name for run in runs for name in names(run.rows))
    known = dict.fromkeys(name.removeprefix(EVALUATION) for name in logged)
    found, missing = [], []
    for name in dict.fromkeys(shown):
        of = {run.name: series for run in runs if (series := curves(run.rows, [name]))}
        if not of:
            listed = [each for each in known if not each.endswith(_OF_TIME)]
            raise UserError(
                f"no run has a figure {shorten(name)!r}{suggestion(name, {**known, **logged}, 2)}\n"
                f"  figures: {', '.join(listed) or 'none'}; eval_NAME is NAME of evaluations alone",
                option="--metric",
            )
        if metrics and (without := [run.name for run in runs if run.name not in of]):
            missing.append(f"{name}: not in {', '.join(without)}")
        found.append(Panel(_plot(runs, name), of))
    if not found:
        raise UserError("no run has a figure yet: metrics.jsonl is empty", option="halfbyte plot")
    return found, missing


def _plot(runs: Sequence[Run], name: str) -> Plot:
    """How a recipe of ``runs`` plots ``name``, else under its own name."""
    key = name.removeprefix(EVALUATION)
    for plot in (plot for run in runs for plot in run.figures.plots):
        if plot.keys == (key,):
            return plot
    return Plot(key, name, name, (name,))


def picture(
    runs: Sequence[Run], found: Sequence[Panel], *, kind: str, dark: bool, weight: float | None
) -> bytes:
    """Draw ``found`` as a picture of the format ``kind``, smoothed by ``weight`` or as long lines usually are."""
    theme = DARK if dark else LIGHT
    colours = dict(zip((run.name for run in runs), theme.lines(len(runs)), strict=True))
    across = min(2, len(found))
    down = math.ceil(len(found) / across)
    wide, high = (_WIDTH, _HEIGHT) if across > 1 else (_ALONE, _HEIGHT_ALONE)
    width, height = wide * across, high * down + _TOP
    figure = canvas(width, height, theme, dpi=160)
    room = max(len(_label(run.name)) for run in runs) * _LABEL * 0.6 / 72 + 0.2 if len(runs) > 1 else 0.2
    kinds: dict[str, Line2D] = {}
    for number, panel in enumerate(found):
        row, column = divmod(number, across)
        box = (
            (column * wide + _LEFT) / width,
            ((down - 1 - row) * high + _BOTTOM) / height,
            (wide - _LEFT - room) / width,
            (high - _BOTTOM - _ABOVE) / height,
        )
        kinds |= _draw(figure.add_axes(box), panel, colours, theme, weight)
    figure.text(
        0.16 / width,
        1 - 0.12 / height,
        _heading(runs),
        va="top",
        color=theme.ink,
        fontsize=12.5,
        parse_math=False,
    )
    figure.legend(
        handles=list(kinds.values()),
        labels=list(kinds),
        loc="upper right",
        bbox_to_anchor=(1 - 0.1 / width, 1 - 0.06 / height),
        ncols=len(kinds),
        frameon=False,
        labelcolor=theme.muted,
        fontsize=9.5,
    )
    return encoded(figure, kind)


def _heading(runs: Sequence[Run]) -> str:
    recipes = ", ".join(sorted({str(run.record["recipe"]) for run in runs}))
    return f"{recipes}, {_label(runs[0].name)}" if len(runs) == 1 else f"{len(runs)} runs of {recipes}"


def _draw(
    axes: Axes, panel: Panel, colours: dict[str, str], theme: Theme, weight: float | None
) -> dict[str, Line2D]:
    """Draw one panel; return the kinds of lines in it, each with a line that shows it."""
    ends: dict[str, float] = {}
    kinds: dict[str, Line2D] = {}
    evaluations = sorted({part for series in panel.of.values() for _, part in series if part != "train"})
    for name, series in panel.of.items():
        for (_, part), points in series.items():
            if part == "train":
                usual = usual_weight(points) if weight is None else weight
                how = usual if panel.plot.noisy else 0.0
                line = training_line(axes, points, colours[name], name, how)
                kinds["training, smoothed" if how else "training"] = _sample(line, theme)
                ends[name] = np.asarray(line.get_ydata(), float)[-1].item()
            else:
                marker = _MARKERS[evaluations.index(part) % len(_MARKERS)]
                line = evaluation_line(axes, points, colours[name], name, theme, marker)
                kinds[part.replace("eval", "evaluation", 1)] = _sample(line, theme)
                ends.setdefault(name, points[-1][1])
    if panel.plot.chance is not None:
        kinds["chance"] = chance_line(axes, panel.plot.chance, theme)
    if panel.plot.bounds is not None:
        bound(axes, panel.plot.bounds)
    dress(axes, theme, panel.plot.title, panel.plot.label)
    if len(colours) > 1:
        _name_lines(axes, ends, colours)
    return kinds


def _sample(line: Line2D, theme: Theme) -> Line2D:
    """A line like ``line``, for what is the same in every colour."""
    sample = Line2D([], [])
    sample.update_from(line)
    sample.set(color=theme.muted, markeredgecolor=theme.muted)
    return sample


def _name_lines(axes: Axes, ends: dict[str, float], colours: dict[str, str]) -> None:
    """Name each run beside the end of its line, none over another."""
    low, high = axes.get_ylim()
    inches = axes.get_position().height * axes.get_figure(root=True).get_figheight()  # type: ignore[union-attr]
    size = min(_LABEL, 72 * inches / 1.3 / len(ends))
    shares = [(end - low) / (high - low) for end in ends.values()]
    for name, place in zip(ends, apart(shares, 1.3 * size / 72 / inches), strict=True):
        axes.text(
            1.02,
            place,
            _label(name),
            transform=axes.transAxes,
            color=colours[name],
            fontsize=size,
            va="center",
            parse_math=False,
        )


def _label(name: str) -> str:
    """The name, or its end, which is where the runs of a sweep differ."""
    name = shorten(str(redact(name)), len(name))
    return name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"
