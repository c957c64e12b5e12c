"""``halfbyte runs DIR...``: runs side by side, which of them is better, and what differs between them."""

from pathlib import Path

from halfbyte.commands.parser import Parser
from halfbyte.config.written import limited
from halfbyte.terminal.wording import say


def main(arguments: list[str]) -> int:
    """Print the runs; return 0. Raises UserError where there is none, and for an unknown key."""
    parser = Parser("runs")
    parser.add_argument(
        "directories", nargs="+", type=Path, metavar="DIR", help="a run, or a folder that has runs in it"
    )
    parser.add_argument(
        "--sort", metavar="KEY", help="the best first: a column, a figure (eval_loss) or an option"
    )
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="KEY=VALUE", help="only these: a column or an option"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list, one object a run")
    given = parser.parse(arguments)

    from halfbyte.tracking import overview, runs, selection

    found = runs.find(given.directories)
    if found.left_out:
        say(limited([f"left out: {line}" for line in found.left_out]), error=True)
    chosen, order = selection.selected(found.runs, given.where), None
    if given.sort is not None:
        chosen, order = selection.ordered(chosen, given.sort)
    if given.json:
        say(overview.as_json(chosen))
    elif not chosen:
        say(f"none of {len(found.runs)} runs has {' and '.join(given.where)}")
    else:
        overview.show(chosen, order)
    return 0
