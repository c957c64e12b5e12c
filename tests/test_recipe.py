"""Recipes are found by metadata alone, and every way a package can get one wrong names that package."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte import recipe as recipes
from halfbyte.cli import main
from halfbyte.errors import UserError
from halfbyte.fast.scope import PARTS
from halfbyte.recipe import Recipe
from halfbyte.task import CAUSAL_LM
from halfbyte.tracking.figures import DEFAULT
from tests import packages

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package of recipes for one test."""

    def add(package: str, points: dict[str, str], **options: str) -> Path:
        site = packages.write(tmp_path / package, package, points, **options)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, package.replace("-", "_"), raising=False)
        return site

    return add


def test_the_shipped_recipes_are_announced_like_any_other() -> None:
    shipped = {entry.name: entry for entry in recipes.entries() if entry.package == "halfbyte"}
    assert set(shipped) == {"cpo", "dpo", "kto", "orpo", "pretrain", "reward", "sft"}
    assert shipped["sft"].object == "halfbyte_recipes.sft:recipe"
    assert [entry.name for entry in recipes.entries()] == sorted(entry.name for entry in recipes.entries())


def test_a_recipe_s_parts_are_checked() -> None:
    recipe = Recipe(config=int, trainer=object, summary="")
    assert (recipe.task, recipe.figures, recipe.fast) == (CAUSAL_LM, DEFAULT, recipes.FAST_PARTS)
    assert recipes.FAST_PARTS == PARTS
    with pytest.raises(ValueError, match="no part of the fast step is named 'heads'; did you mean head"):
        Recipe(config=int, trainer=object, summary="", fast=frozenset({"heads", "layers"}))


def test_what_a_recipe_is_made_of_imports_nothing_heavy() -> None:
    code = (
        "import sys, halfbyte.recipe, halfbyte.task, halfbyte.tracking.figures\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'numpy', 'matplotlib', 'wandb', 'datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_listing_imports_nothing(install: Install) -> None:
    install("explosive", {"boom": "explosive:recipe"}, code="raise SystemExit('imported')")
    entry = next(entry for entry in recipes.entries() if entry.name == "boom")
    assert (entry.package, entry.version, entry.object) == ("explosive", "1.0", "explosive:recipe")
    recipes.check(recipes.entries())
    assert "explosive" not in sys.modules


def test_only_the_named_recipe_is_imported(install: Install) -> None:
    install("chosen-one", {"chosen": "chosen_one:recipe"})
    install("other-one", {"other": "other_one:recipe"})
    recipe = recipes.load("chosen")
    assert isinstance(recipe, Recipe)
    assert recipe.summary == "a third party's"
    assert "other_one" not in sys.modules


def test_a_package_on_the_path_twice_is_one(install: Install, tmp_path: Path, monkeypatch) -> None:
    install("twice", {"again": "twice:recipe"})
    monkeypatch.syspath_prepend(str(packages.write(tmp_path / "second", "twice", {"again": "twice:recipe"})))
    recipes.check(recipes.entries())
    assert recipes.load("again").summary == "a third party's"


def test_a_name_claimed_twice_names_both_packages(install: Install) -> None:
    install("first-claim", {"mine": "first_claim:recipe"})
    install("second-claim", {"mine": "second_claim:recipe"}, version="2.5")
    for attempt in (lambda: recipes.load("mine"), lambda: recipes.check(recipes.entries())):
        with pytest.raises(
            UserError, match=r"'mine' is claimed by first-claim 1\.0 .* and second-claim 2\.5"
        ):
            attempt()
    assert recipes.load("sft").summary  # the claim on another name stops nobody else


def test_a_third_party_cannot_take_a_shipped_name_unseen(install: Install) -> None:
    install("pretender", {"sft": "pretender:recipe"})
    with pytest.raises(UserError, match=r"'sft' is claimed by halfbyte .* and pretender 1\.0"):
        recipes.load("sft")


@pytest.mark.parametrize("name", [*sorted(recipes.COMMANDS), "help", "version"])
def test_a_command_name_is_reserved(install: Install, name: str) -> None:
    install("grabber", {name: "grabber:recipe"})
    with pytest.raises(
        UserError, match=rf"'{name}' of package grabber 1\.0 takes the name of a halfbyte command"
    ):
        recipes.check(recipes.entries())


@pytest.mark.parametrize(
    ("wrong", "right"), [("stf", "sft"), ("dop", "dpo"), ("recipe", "recipes"), ("dmo", "demo")]
)
def test_an_unknown_name_lists_the_known_and_suggests_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(
        UserError, match=rf"no recipe or command named '{wrong}'; did you mean '{right}'\?"
    ) as caught:
        recipes.load(wrong)
    assert "recipes: cpo, dpo, kto, orpo, pretrain, reward, sft" in str(caught.value)


def test_a_name_near_nothing_gets_no_suggestion() -> None:
    with pytest.raises(UserError) as caught:
        recipes.load("zzzzzz")
    assert "did you mean" not in str(caught.value)


def test_an_object_that_is_no_recipe(install: Install) -> None:
    install("confused", {"odd": "confused:recipe"}, code="recipe = {'config': None}")
    with pytest.raises(
        UserError, match=r"confused:recipe of package confused 1\.0 is dict, not a halfbyte\.Recipe"
    ):
        recipes.load("odd")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "import a_module_that_is_not_there",
            "ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
        ),
        ("recipes = None", "AttributeError: module 'broken' has no attribute 'recipe'"),
        ("recipe = = 1", "SyntaxError: invalid syntax"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("raise RuntimeError('one\\ntwo\\n' * 50)", "RuntimeError: one"),
        ("raise KeyError", "KeyError: KeyError"),
        ("from halfbyte import Recipe\nrecipe = Recipe(config=int, summary='')", "needs a `trainer` class"),
    ],
)
def test_a_recipe_that_does_not_import_names_its_package(install: Install, code: str, reason: str) -> None:
    install("broken", {"bad": "broken:recipe"}, code=code)
    with pytest.raises(UserError, match=r"'bad' of package broken 1\.0 cannot be imported") as caught:
        recipes.load("bad")
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_parts_of_the_fast_step_have_one_set_of_names() -> None:
    """The recipe's module imports nothing heavy, and so holds the names a second time."""
    from halfbyte.fast.scope import PARTS

    assert recipes.FAST_PARTS == PARTS


def test_rows_of_another_recipe_are_told_of_it(install: Install) -> None:
    install("explosive", {"boom": "explosive:recipe"}, code="raise ImportError('no')")
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert (
        recipes.recipes_for(list(pair), pair)
        == "\n  these rows are preference pairs, for: halfbyte cpo, halfbyte dpo, halfbyte kto, halfbyte orpo, "
        "halfbyte reward"
    )
    text = {"question": "a", "answer": "b"}
    assert "these rows are text, for: halfbyte pretrain, halfbyte sft" in recipes.recipes_for(
        list(text), text
    )
    kto = {"prompt": "a", "completion": "b", "label": True}
    assert "unpaired preferences" in recipes.recipes_for(list(kto), kto)
    assert recipes.recipes_for(["x"], {"x": 1}) == ""


@pytest.mark.parametrize(
    ("recipe", "row", "words"),
    [
        (
            "sft",
            {"question": "a", "chosen": "b", "rejected": "c"},
            "preference pairs, for: halfbyte cpo, halfbyte dpo, halfbyte kto, halfbyte orpo, halfbyte reward",
        ),
        (
            "dpo",
            {"messages": [{"role": "user", "content": "a"}]},
            "text, for: halfbyte pretrain, halfbyte sft",
        ),
        (
            "dpo",
            {"prompt": "a", "completion": "b", "label": True},
            "these rows are unpaired preferences, for:",
        ),
    ],
)
def test_a_recipe_given_the_rows_of_another(
    model_dir: Callable[..., Path], tmp_path: Path, recipe: str, row: dict, words: str, capsys
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row))
    output = tmp_path / "run"
    options = ["--model_name_or_path", str(model_dir("llama")), "--dataset_name", str(rows)]
    assert (
        main([recipe, *options, "--output_dir", str(output), "--report_to", "none", "--dtype", "float32"])
        == 2
    )
    error = capsys.readouterr().err
    assert words in error, error
    assert not output.exists()
