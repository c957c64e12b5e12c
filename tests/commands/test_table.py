"""One table of commands, which dispatch, help and the reserved names read; one style of parser."""

import importlib
from pathlib import Path

import pytest

from halfbyte import commands
from halfbyte import recipe as recipes
from halfbyte.cli import main, usage
from halfbyte.commands.parser import Parser
from halfbyte.errors import UserError

PRESENT = list(commands.TABLE)
WITH_PARSER = [
    name for name in PRESENT if name not in ("cache", "plan")
]  # a plan has options of its recipe too
OF_ANY_NUMBER = ("plot", "runs")
# What a command cannot do without.
REQUIRED = {
    "merge": ["adapter", "--output_dir", "out"],
    "plan": ["sft"],
    "plot": ["run"],
    "quantize": ["model", "--output_dir", "out"],
    "report": ["model"],
    "runs": ["run"],
    "verify": ["there"],
}


def test_every_command_is_a_module_with_a_main_and_a_line_in_the_help() -> None:
    here = Path(commands.__file__).parent
    modules = {path.stem for path in here.glob("*.py")} - {"__init__", "parser"}
    assert modules == set(PRESENT)
    for name in PRESENT:
        assert callable(importlib.import_module(f"halfbyte.commands.{name}").main)
        assert commands.TABLE[name].usage in usage()
        assert commands.TABLE[name].summary in usage()


def test_no_recipe_may_take_the_name_of_a_command() -> None:
    assert set(commands.TABLE) == recipes.COMMANDS


def test_the_help_fits_a_terminal() -> None:
    assert max(map(len, usage().splitlines())) <= 110


@pytest.mark.parametrize("name", WITH_PARSER)
def test_a_command_suggests_the_nearest_option_and_shows_its_usage(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: {commands.TABLE[name].usage}\n" in capsys.readouterr().out
    words = REQUIRED.get(name, [])
    for written in (words, []):  # also before what is missing
        assert main([name, *written, "--hlep"]) == 2
        assert capsys.readouterr().err == (
            f"error: halfbyte {name}: unknown option --hlep; did you mean --help?\n"
            f"usage: {commands.TABLE[name].usage}\n"
        )
    assert main([name, *words, "stray", "second"]) == 2
    if name not in OF_ANY_NUMBER:
        assert "unknown argument" in capsys.readouterr().err


def test_options_are_not_abbreviated() -> None:
    parser = Parser("recipes")
    parser.add_argument("--json", action="store_true")
    assert parser.parse(["--json"]).json is True
    for word in ("--js", "--jso=1", "--json=1"):
        with pytest.raises(UserError, match=r"^halfbyte recipes: .*\nusage: halfbyte recipes \[--json\]$"):
            parser.parse([word])
