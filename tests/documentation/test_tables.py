"""The READMEs say what the code says: generated parts are current, options exist, links and files are there."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from halfbyte import adapters
from halfbyte.data import PreferencePairs, ScoredPairs, Text, UnpairedPreferences
from halfbyte.recipe import Recipe
from tests.documentation.documents import DOCUMENTS, ROOT, blocks, code, prose
from tests.documentation.generated import (
    HELD,
    RECIPE,
    REGIONS,
    UPSTREAM,
    WHY,
    added,
    differing,
    gloss,
    regenerated,
    settings,
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name)
def test_the_generated_parts_are_current(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert regenerated(text) == text, "run `make docs`"


def test_every_region_is_shown() -> None:
    shown = {
        name
        for path in DOCUMENTS
        for name in re.findall(r"<!-- generated: (\w+) -->", path.read_text(encoding="utf-8"))
    }
    assert shown == REGIONS.keys()


def rows(region: str) -> list[list[str]]:
    lines = REGIONS[region]().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_table_of_defaults_has_every_difference_and_its_reason() -> None:
    stated = {code(row[0])[0] for row in rows("defaults")}
    assert stated == differing().keys() == WHY.keys()
    for option, theirs, ours, _ in rows("defaults"):
        name, *only = code(option)
        for recipe in only or UPSTREAM:
            pair = differing()[name][recipe]
            assert (_read(theirs), _read(ours)) == tuple(getattr(value, "value", value) for value in pair)


def _read(cell: str) -> object:
    value = yaml.safe_load(code(cell)[0])
    # YAML alone reads 5e-06 as text; halfbyte reads a number.
    return float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+e-\d+", value) else value


def test_the_table_of_added_options_is_complete() -> None:
    stated = {code(row[0])[0]: yaml.safe_load(code(row[1])[0]) for row in rows("options")}
    assert stated == {name: field.default for name, field in added().items()}
    assert all(field.help for field in added().values())


def test_every_layout_and_field_has_its_words() -> None:
    formats = (Text, PreferencePairs, UnpairedPreferences, ScoredPairs)
    layouts = [str(layout) for each in formats for layout in each.layouts]
    assert set(layouts) == HELD.keys()
    assert {field.name for field in fields(Recipe)} == RECIPE.keys()
    shown = [" + ".join(code(row[1])) for row in rows("formats")]
    assert shown == layouts


def test_refused_initializations_are_all_named() -> None:
    named = {name for row in rows("initializations") for name in code(row[0])}
    assert named == {*adapters.INITIALIZATIONS, *adapters.REFUSED_INITIALIZATIONS}


def test_every_option_in_code_marks_exists() -> None:
    """``name: value`` and ``--name`` in the prose are options of a shipped recipe or of the launcher."""
    known = set()
    for name in UPSTREAM:
        known |= set(settings(name).resolved())
    marks = code(prose())
    named = {name for mark in marks for name in re.findall(r"^(\w+): ", mark)}
    for command in (mark for mark in marks if mark.startswith(("--", "halfbyte ", "accelerate "))):
        named |= set(re.findall(r"--(\w+)", command))
    launcher = {action.dest for action in launch_command_parser()._actions}
    assert len(named & known) > 10
    # `--key=value` is any option, and these are not options of a configuration.
    others = {
        "all",
        "config",
        "data",
        "debug",
        "env",
        "full",
        "help",
        "key",
        "launch",
        "json",
        "metric",
        "output",
        "preview",
        "probe",
        "output_dir",
        "recipe",
        "row",
        "smooth",
        "sort",
        "tokens_per_second",
        "where",
    }
    assert named - known - launcher <= others


def test_the_tree_shows_every_file_with_its_gloss() -> None:
    (tree,) = (block.text for block in blocks("text") if "halfbyte/\n" in block.text)
    for room in (ROOT / "plugin" / "halfbyte", ROOT / "recipes" / "halfbyte_recipes"):
        for path in room.rglob("*.py"):
            if path.name != "__init__.py" and (ROOT / "plugin/halfbyte/launch") not in path.parents:
                assert re.search(rf"^ +{re.escape(path.name)} +{re.escape(gloss(path))}$", tree, re.M), path
                assert gloss(path)


def test_links_point_at_something() -> None:
    def headings(path: Path) -> set[str]:
        found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
        return {re.sub(r"[^\w -]", "", each).strip().lower().replace(" ", "-") for each in found}

    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            if target.startswith("https://"):
                continue
            path, _, heading = target.partition("#")
            place = (document.parent / path).resolve() if path else document
            assert place.exists(), f"{document}: {target}"
            assert not heading or heading in headings(place), f"{document}: {target}"


def test_the_root_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220
