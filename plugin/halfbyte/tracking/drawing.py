"""How pictures look: colours that the colour-blind can tell apart, on light and on dark, and axes without ornament."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from halfbyte.tracking.series import Points, columns, smooth

# Okabe and Ito's palette.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Theme:
    """The colours of a picture: ``colours`` of lines, ``among`` the part of the map for more lines than those."""

    background: str
    ink: str
    muted: str
    grid: str
    colours: tuple[str, ...]
    among: tuple[float, float]

    def lines(self, count: int) -> list[str]:
        """``count`` colours; of many lines those that are near each other in order are alike."""
        if count <= len(self.colours):
            return list(self.colours[:count])
        low, high = self.among
        return [to_hex(colormaps["viridis"](low + (high - low) * i / (count - 1))) for i in range(count)]


LIGHT = Theme("#ffffff", "#1f2328", "#6e7781", "#e6e8eb", COLOURS, (0.0, 0.85))
DARK = Theme(
    "#0d1117",
    "#e6edf3",
    "#8b949e",
    "#262c36",
    # The same hues, the dark ones lighter.
    ("#56B4E9", "#FF8A3D", "#2CC295", "#E59BC5", "#F0C64A", "#A9B8FF"),
    (0.25, 1.0),
)


def canvas(width: float, height: float, theme: Theme, dpi: int = 150) -> Canvas:
    """An empty picture of ``width`` by ``height`` inches."""
    figure = Canvas(figsize=(width, height), dpi=dpi, facecolor=theme.background)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, theme: Theme, title: str, label: str) -> None:
    """Give ``axes`` over steps their title, thin lines and a quiet grid."""
    axes.set_facecolor(theme.background)
    axes.set_title(title, parse_math=False, loc="left", fontsize=11, color=theme.ink)
    axes.set_xlabel("step", color=theme.muted)
    axes.set_ylabel(label, color=theme.muted, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    axes.tick_params(length=0, labelcolor=theme.muted, labelsize=9.5)
    axes.yaxis.get_offset_text().set_color(theme.muted)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=theme.muted, linewidth=0.8)


def training_line(axes: Axes, points: Points, colour: str, label: str, weight: float) -> Line2D:
    """Draw values of training: with a ``weight`` their running mean, and the values faintly behind it."""
    steps, values = columns(points)
    if weight:
        # Every batch differs.
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.28)
        values = smooth(values, weight)
    marker = "o" if len(values) < 15 else ""
    return axes.plot(steps, values, label=label, color=colour, linewidth=1.8, marker=marker, markersize=3)[0]


def evaluation_line(
    axes: Axes, points: Points, colour: str, label: str, theme: Theme, marker: str = "o"
) -> Line2D:
    """Draw values of evaluations: open markers on a dashed line."""
    return axes.plot(
        *columns(points),
        label=label,
        color=colour,
        linewidth=1.4,
        linestyle=(0, (4, 2)),
        marker=marker,
        markersize=5,
        markerfacecolor=theme.background,
        markeredgewidth=1.4,
    )[0]


def chance_line(axes: Axes, value: float, theme: Theme) -> Line2D:
    """Draw the value that guessing has."""
    return axes.axhline(value, color=theme.muted, linewidth=1, linestyle=":", label="chance")


def bound(axes: Axes, bounds: tuple[float, float]) -> None:
    """Fix the vertical axis, with room for lines at its ends."""
    low, high = bounds
    axes.set_ylim(low - 0.02 * (high - low), high + 0.02 * (high - low))


def apart(places: Sequence[float], least: float) -> list[float]:
    """``places`` moved as little as needed for any two to be ``least`` apart, in their order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[tuple[float, list[int]]] = []  # the lowest place of each, and who is in it
    for i in order:
        start, members = places[i], [i]
        while groups and groups[-1][0] + least * len(groups[-1][1]) > start:
            _, before = groups.pop()
            members = before + members
            middle = sum(places[m] for m in members) / len(members)
            start = middle - least * (len(members) - 1) / 2
        groups.append((start, members))
    moved = list(places)
    for start, members in groups:
        for number, member in enumerate(members):
            moved[member] = start + least * number
    return moved


def encoded(figure: Canvas, kind: str) -> bytes:
    """The picture as ``png`` or ``svg``; the same picture has the same bytes."""
    written = io.BytesIO()
    if kind == "svg":
        with rc_context({"svg.hashsalt": "halfbyte"}):
            figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    else:
        # The default level of compression took longer than drawing.
        figure.savefig(written, format="png", pil_kwargs={"compress_level": 1})
    return written.getvalue()
