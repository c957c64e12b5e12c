"""The page of plots of a report: weights and levels, the error of each layer, and quality against bits."""

import io
import math

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from halfbyte.export import schemes
from halfbyte.export.findings import Report
from halfbyte.terminal.wording import shorten
from halfbyte.tracking.drawing import COLOURS

_COLOURS = (*COLOURS, "#000000")


def picture(found: Report) -> bytes:
    """Return the page as a PNG."""
    figure = Figure(figsize=(11, 8), dpi=120)
    FigureCanvasAgg(figure)
    figure.suptitle(f"Quantizing {shorten(found.model, 80)}", fontsize=12, parse_math=False)
    grid = figure.add_gridspec(2, 2, hspace=0.32, wspace=0.22, left=0.08, right=0.97, top=0.92, bottom=0.08)
    _levels(figure.add_subplot(grid[0, 0]), found)
    _quality(figure.add_subplot(grid[0, 1]), found)
    _layers(figure.add_subplot(grid[1, :]), found)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()


def _levels(axes: Axes, found: Report) -> None:
    edges = torch.linspace(-1, 1, len(found.histogram) + 1)
    axes.stairs(found.histogram.numpy(), edges.numpy(), fill=True, color=_COLOURS[5])
    for level in schemes.levels().tolist():
        axes.axvline(level, color=_COLOURS[1], linewidth=0.8)
    axes.set_title("Weights over the largest of their block, and the levels of NF4", fontsize=9)
    axes.set_ylabel("share")


def _quality(axes: Axes, found: Report) -> None:
    measured = bool(found.losses)
    for place, (name, (formula, _)) in enumerate(found.bits.items()):
        value, spread = found.loss(name)[2:] if measured else (found.error(name), None)
        compared = place < len(schemes.COMPARED)
        axes.errorbar(
            formula,
            value,
            yerr=spread,
            marker="o" if compared else ".",
            color=_COLOURS[place % len(_COLOURS)] if compared else "#888888",
            linestyle="none",
            label=name if compared else ("NF4, other blocks" if place == len(schemes.COMPARED) else None),
        )
    axes.set_title(
        f"{'Loss over the model as it is' if measured else 'Relative error'}, against bits", fontsize=9
    )
    axes.set_xlabel("bits a parameter")
    axes.set_ylabel("nats a token" if measured else "relative error")
    axes.legend(fontsize=7)


def _layers(axes: Axes, found: Report) -> None:
    for place, scheme in enumerate(schemes.COMPARED):
        errors = [math.sqrt(each.errors[scheme.name] / (each.norm or 1.0)) for each in found.layers]
        axes.plot(errors, color=_COLOURS[place % len(_COLOURS)], linewidth=1, label=scheme.name)
    axes.set_title("Relative error of each weight, in the order of the model", fontsize=9)
    axes.set_xlabel("weight")
    axes.legend(fontsize=7, ncols=len(schemes.COMPARED))
