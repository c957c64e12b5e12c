"""plots/*.png, drawn from the rows of metrics.jsonl."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from halfbyte.files import replace_file
from halfbyte.terminal.wording import shorten
from halfbyte.tracking.figures import DEFAULT, Figures, Plot, are_ties
from halfbyte.tracking.rows import Row

Points = list[tuple[int, float]]
Series = dict[tuple[str, str], Points]

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


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
        series = _series(rows, plot.keys)
        if series:
            path = directory / f"{plot.name}.png"
            if drawn.get(plot.name) != series or not path.exists():
                replace_file(path, _png(plot, series, title))
                drawn[plot.name] = series
            written.append(path)
    return written


def _series(rows: Sequence[Row], keys: Sequence[str]) -> Series:
    """Points by (key, "train" or the evaluation's name), in the order of `keys`, training first."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    own = {name for row in rows for name in row if not name.startswith("eval_")}
    for key in keys:
        # Evaluation on several data sets logs eval_NAME_loss; eval_aux_loss is another figure's, which training logs.
        evaluation = re.compile(rf"eval_(?:(.+)_)?{re.escape(key)}")
        found[key, "train"] = {}
        for row in rows:
            for name, value in row.items():
                if not isinstance(value, int | float):
                    continue
                if are_ties(row, name):
                    continue
                if name == key:
                    found[key, "train"][row["step"]] = value
                elif (match := evaluation.fullmatch(name)) and (name == f"eval_{key}" or name[5:] not in own):
                    part = f"eval {match[1]}" if match[1] else "eval"
                    found.setdefault((key, part), {})[row["step"]] = value
    return {name: sorted(points.items()) for name, points in found.items() if points}


def _png(plot: Plot, series: Series, title: str) -> bytes:
    # Fixed margins and no mathtext: measuring the text took three quarters of the time of a picture.
    figure = Canvas(figsize=(7, 4.2), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.11, 0.13, 0.86, 0.76))
    for index, ((key, part), points) in enumerate(series.items()):
        if len(plot.keys) == 1:
            label, colour = part, COLOURS[index % len(COLOURS)]
        else:
            label, colour = f"{key.rsplit('/', 1)[-1]}, {part}", COLOURS[plot.keys.index(key)]
        if part != "train":
            axes.plot(
                *_columns(points), label=label, color=colour, marker="o", markersize=4.5, linestyle="--"
            )
        else:
            _training_line(axes, points, label, colour, plot.noisy)
    if plot.chance is not None:
        axes.axhline(plot.chance, color="#888888", linewidth=1, linestyle=":", label="chance")
    if plot.bounds is not None:
        low, high = plot.bounds
        axes.set_ylim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    axes.set_title(f"{plot.title}  ·  {shorten(title)}", parse_math=False, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(plot.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(
        picture, format="png", pil_kwargs={"compress_level": 1}
    )  # the default took longer than drawing
    return picture.getvalue()


def _training_line(axes: Axes, points: Points, label: str, colour: str, noisy: bool) -> None:
    steps, values = _columns(points)
    if noisy and len(values) > 100:
        # Every batch differs: show the rows faintly and their running mean over them.
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        values, label = _smooth(values), f"{label} (smoothed)"
    marker = "o" if len(values) < 15 else ""
    axes.plot(steps, values, label=label, color=colour, linewidth=1.6, marker=marker, markersize=3)


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """The exponential running mean, with the bias of its start taken out."""
    mean, total, smoothed = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed
