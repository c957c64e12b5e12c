"""``halfbyte plan RECIPE --config FILE``: would it fit, how long would it take, and what would it train on."""

import argparse
import json
from pathlib import Path

from halfbyte import recipe as recipes
from halfbyte.commands.parser import Parser
from halfbyte.errors import UserError
from halfbyte.terminal.wording import say


def main(arguments: list[str]) -> int:
    """Print the plan; return 1 if the run would not fit. Raises UserError for what a run would refuse."""
    parser = Parser("plan")
    parser.add_argument("recipe", metavar="RECIPE", help="the recipe, with its options behind it")
    parser.add_argument("--launch", type=Path, metavar="FILE", help="the launch file to plan for")
    parser.add_argument("--gpu", metavar="SIZE", help='memory of a GPU and how many, as in "24GB x 2"')
    parser.add_argument("--full", action="store_true", help="read all rows, not 2,000 and the longest")
    parser.add_argument(
        "--probe", action="store_true", help="train a few steps here, for the time of an epoch"
    )
    parser.add_argument(
        "--tokens_per_second", type=float, help="what one device computes, for the time of an epoch"
    )
    parser.add_argument(
        "--preview",
        type=int,
        metavar="N",
        help="show the first N rows as they are trained on, in the place of the plan",
    )
    parser.add_argument(
        "--row", type=int, metavar="K", help="show row K, counted from 1, in the place of the plan"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given, options = parser.parse_beside(arguments)
    if given.tokens_per_second is not None and not given.tokens_per_second > 0:
        raise UserError("must be positive", option="--tokens_per_second")
    if given.preview is not None and given.preview < 1:
        raise UserError("must be at least 1", option="--preview")
    _check_shown(given)
    if given.probe and given.gpu is not None:
        raise UserError(
            "measures this machine; leave --gpu out, or state --tokens_per_second", option="--probe"
        )
    recipe, _ = recipes.named(given.recipe, options)
    from halfbyte.plan import page, plan, preview, probe
    from halfbyte.plan.rehearsal import Rehearsal
    from halfbyte.run import quieten

    quieten()
    rehearsal = Rehearsal.of(given.recipe, recipe, options, given.gpu, given.launch)
    if given.preview is not None or given.row is not None:
        shown = [given.row] if given.row is not None else range(1, given.preview + 1)
        if given.json:
            say(json.dumps([each.as_dict() for each in preview.previews(rehearsal, shown)]))
        else:
            preview.show(rehearsal, shown)
        return 0
    rate = given.tokens_per_second
    if given.probe and rate is None:
        rate = probe.tokens_per_second(given.recipe, options)
    found = plan.plan(rehearsal, full=given.full, tokens_per_second=rate)
    say(*([json.dumps(found.as_dict(), indent=2)] if given.json else page.page(found)))
    return int(found.verdict == "does not fit")


def _check_shown(given: argparse.Namespace) -> None:
    """Raise :class:`UserError` for what says how to plan where rows are shown in the place of the plan."""
    if given.preview is None and given.row is None:
        return
    shown = "--row" if given.preview is None else "--preview"
    unread = {
        "--full": given.full,
        "--probe": given.probe,
        "--tokens_per_second": given.tokens_per_second is not None,
        "--row": given.row is not None and shown != "--row",
    }
    for option, is_given in unread.items():
        if is_given:
            raise UserError(
                f"has no effect with {shown}, which shows rows in the place of the plan", option=option
            )
