"""plots/*.png, drawn from the rows of metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path

from halfbyte.files import replace_file
from halfbyte.terminal.wording import shorten
from halfbyte.tracking.drawing import (
    LIGHT,
    bound,
    canvas,
    chance_line,
    dress,
    encoded,
    evaluation_line,
    training_line,
)
from halfbyte.tracking.figures import DEFAULT, Figures, Plot
from halfbyte.tracking.rows import Row
from halfbyte.tracking.series import Series, curves, usual_weight


def draw(
    rows: Sequence[Row],
    directory: Path,
    title: str,
    drawn: dict[str, Series] | None = None,
    *,
    figures: Figures = DEFAULT,
) -> list[Path]:
    """Draw every plot of ``figures`` that ``rows`` have values for, and return the files, written now or before.

    ``rows`` are those of ``metrics.jsonl``; of rows with one step the last counts (a resumed run repeats steps).
    ``title`` names the run above every picture. ``drawn`` holds what each picture shows already, by its
    name: such a picture is left as it is. It is updated.
    """
    written = []
    drawn = {} if drawn is None else drawn
    for plot in figures.plots:
        series = curves(rows, plot.keys)
        if series:
            path = directory / f"{plot.name}.png"
            if drawn.get(plot.name) != series or not path.exists():
                replace_file(path, _png(plot, series, title))
                drawn[plot.name] = series
            written.append(path)
    return written


def _png(plot: Plot, series: Series, title: str) -> bytes:
    # Fixed margins and no mathtext: measuring the text took three quarters of the time of a picture.
    figure = canvas(7, 4.2, LIGHT)
    axes = figure.add_axes((0.11, 0.13, 0.86, 0.76))
    colours = LIGHT.lines(max(len(series), len(plot.keys)))
    for index, ((key, part), points) in enumerate(series.items()):
        if len(plot.keys) == 1:
            label, colour = part, colours[index]
        else:
            label, colour = f"{key.rsplit('/', 1)[-1]}, {part}", colours[plot.keys.index(key)]
        if part != "train":
            evaluation_line(axes, points, colour, label, LIGHT)
        else:
            weight = usual_weight(points) if plot.noisy else 0.0
            training_line(axes, points, colour, f"{label} (smoothed)" if weight else label, weight)
    if plot.chance is not None:
        chance_line(axes, plot.chance, LIGHT)
    if plot.bounds is not None:
        bound(axes, plot.bounds)
    dress(axes, LIGHT, f"{plot.title}  ·  {shorten(title)}", plot.label)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, labelcolor=LIGHT.ink)
    return encoded(figure, "png")
