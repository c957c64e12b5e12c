"""``halfbyte report MODEL [--data ROWS]``: what each quantization scheme costs on a model."""

from pathlib import Path

from halfbyte.commands.parser import Parser
from halfbyte.terminal import passes
from halfbyte.terminal.wording import say


def main(arguments: list[str]) -> int:
    """Compare, print and write; return 0. Raises as :func:`halfbyte.export.report.report` does."""
    parser = Parser("report")
    parser.add_argument("model", metavar="MODEL", help="a hub id or a directory, in 16 or 32 bits or MXFP4")
    parser.add_argument("--data", help="rows to measure the loss on, with a test split")
    parser.add_argument("--recipe", help="the recipe that reads --data")
    parser.add_argument("--model_revision", default="main", help="a branch, tag or commit")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("halfbyte-report"),
        help="for report.csv, layers.csv and report.png",
    )
    given = parser.parse(arguments)

    from halfbyte.export.report import report

    with passes.shown(bar=True):
        found = report(
            given.model, given.output_dir, revision=given.model_revision, data=given.data, recipe=given.recipe
        )
    say(*found.lines(), f"written: {given.output_dir}/report.csv, layers.csv, report.png")
    return 0
