"""``halfbyte recipes``: the installed recipes, from package metadata alone."""

import json

from halfbyte import recipe
from halfbyte.commands.parser import Parser
from halfbyte.terminal.wording import say


def main(arguments: list[str]) -> int:
    """Print one line a recipe, or JSON; raises UserError where two packages claim one name."""
    parser = Parser("recipes")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")
    options = parser.parse(arguments)
    listed = recipe.entries()
    recipe.check(listed)
    if options.json:
        say(json.dumps([vars(entry) for entry in listed], indent=2))
        return 0
    width = max((len(entry.name) for entry in listed), default=0)
    for entry in listed:
        say(f"{entry.name:<{width}}  {entry.package} {entry.version}  {entry.object}")
    if not listed:
        say(f"no recipes are installed (entry points in the group {recipe.GROUP!r})")
    return 0
