"""The help of one recipe: its summary, how to call it, and every option by the class that declares it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfbyte.config.fields import Field, described
from halfbyte.config.limits import range_for
from halfbyte.config.sources import shorten


def print_help(
    prog: str, summary: str, classes: Sequence[type], fields: Mapping[str, Field], values: Mapping[str, Any]
) -> None:
    """Print the help to standard output; `values` are the defaults."""
    console = Console(highlight=False, soft_wrap=False)
    if summary:
        console.print(Text(f"{summary}\n"))
    console.print(Text(f"usage: {prog} --config FILE [--key value] [--key=value] [--list a b] [--flag]"))
    console.print(Text("Every option is a key of the YAML file too; the command line wins over the file.\n"))
    for owner in classes:
        options = [field for field in fields.values() if field.owner is owner]
        table = Table(
            title=owner.__name__, title_justify="left", title_style="bold", box=None, pad_edge=False
        )
        for heading in ("option", "default", "meaning"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "option")
        for field in options:
            table.add_row(Text(f"--{field.name}"), Text(_default(values[field.name])), Text(_meaning(field)))
        if options:
            console.print(table)
            console.print()


def _default(value: Any) -> str:
    value = getattr(value, "value", value)
    return shorten(
        {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    )


def _meaning(field: Field) -> str:
    limit = range_for(field.name, field.default)
    kind = f"one of {', '.join(map(str, field.choices))}" if field.choices else described(field.type)
    return f"{field.help} [{kind}{', ' + limit[0] if limit else ''}]".strip()
