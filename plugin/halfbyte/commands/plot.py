"""``halfbyte plot DIR...``: curves of several runs in one picture, or the plots of one run again."""

from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.commands.parser import Parser
from halfbyte.config.written import limited
from halfbyte.errors import UserError
from halfbyte.files import replace_file
from halfbyte.terminal.wording import first_line, say, shorten

if TYPE_CHECKING:
    from halfbyte.tracking.runs import Run

_KINDS = (".png", ".svg")


def main(arguments: list[str]) -> int:
    """Draw and write; return 0. Raises UserError for no run, an unknown figure, or a file that cannot be written."""
    parser = Parser("plot")
    parser.add_argument(
        "directories", nargs="+", type=Path, metavar="DIR", help="a run, or a folder that has runs in it"
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        default=[],
        metavar="NAME",
        help="figures to draw; unset: what the recipe compares",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="a .png or .svg; unset: halfbyte-plot.png"
    )
    parser.add_argument("--dark", action="store_true", help="for a dark page")
    parser.add_argument(
        "--smooth", type=float, metavar="W", help="weight of the running mean, from 0 (none) to below 1"
    )
    given = parser.parse(arguments)
    if given.output is not None and given.output.suffix.lower() not in _KINDS:
        raise UserError(f"{shorten(str(given.output))} must end in .png or .svg", option="--output")
    if given.smooth is not None and not 0 <= given.smooth < 1:
        raise UserError(f"{given.smooth} must be at least 0 and below 1", option="--smooth")

    from halfbyte.tracking import runs

    found = runs.find(given.directories)
    if found.left_out:
        say(limited([f"left out: {line}" for line in found.left_out]), error=True)
    own = not (given.metric or given.output or given.dark or given.smooth is not None)
    try:
        if own and len(found.runs) == 1:
            say(*_redrawn(found.runs[0]))
        else:
            output = given.output or Path("halfbyte-plot.png")
            say(*_overlaid(found.runs, given.metric, output, dark=given.dark, weight=given.smooth))
    except OSError as error:
        raise UserError(f"cannot write: {first_line(error)}", option="halfbyte plot") from error
    return 0


def _redrawn(run: "Run") -> list[str]:
    """Draw the run's own plots again; return a line a file."""
    from halfbyte.tracking import plots

    title = f"{run.record['recipe']}, {run.directory.name}"
    written = plots.draw(run.rows, run.directory / "plots", title, figures=run.figures)
    if not written:
        raise UserError(f"{run.name} has no figures yet", option="halfbyte plot")
    return [f"written: {path}" for path in written]


def _overlaid(
    found: "list[Run]", metrics: list[str], output: Path, *, dark: bool, weight: float | None
) -> list[str]:
    """Draw the runs in one picture; return the lines to print."""
    from halfbyte.tracking import overlay

    panels, missing = overlay.panels(found, metrics)
    kind = output.suffix.lower().removeprefix(".")
    replace_file(output, overlay.picture(found, panels, kind=kind, dark=dark, weight=weight))
    return [*missing, f"written: {output}"]
