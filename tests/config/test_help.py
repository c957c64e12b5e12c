"""The help of a recipe: the most used options on one page, all of them on request."""

import dataclasses

import pytest
from trl import ModelConfig, SFTConfig
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments

from halfbyte import recipe as recipes
from halfbyte import run
from halfbyte.config import RunArguments, read
from halfbyte.config.fields import fields_of
from halfbyte.config.help import LINES, USED, WIDTH
from halfbyte.errors import UserError
from halfbyte.plugin import QLoRAPlugin
from tests.config.reading import parse

SHIPPED = [entry.name for entry in recipes.entries() if entry.package == "halfbyte"]
NAMES = [name for _, options in USED for name, _ in options]


def classes(config: type) -> tuple[type, ...]:
    return (RunArguments, config, QLoRAPlugin, DatasetMixtureConfig)


def printed(capsys: pytest.CaptureFixture[str], config: type, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        read(
            argv,
            classes(config),
            prog="halfbyte sft",
            summary="A recipe",
            defaults=run.training_defaults(config),
        )
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", SHIPPED)
def test_the_help_is_one_page(capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    config = recipes.load(recipe).config
    text = printed(capsys, config, "--help")
    lines = text.splitlines()
    assert len(lines) <= LINES == 80
    assert max(map(len, lines)) <= WIDTH == 100
    assert "..." not in text.replace("none, ...", "")
    known = fields_of(classes(config))
    for name in NAMES:
        assert (f"--{name} " in text) == (name in known), name
    assert lines[-1] == f"halfbyte sft --help all lists all {len(known)} options."


def test_the_most_used_options_exist_and_ours_are_among_them() -> None:
    known = {name for recipe in SHIPPED for name in fields_of(classes(recipes.load(recipe).config))}
    assert len(NAMES) == len(set(NAMES))
    assert set(NAMES) <= known
    ours = set(fields_of([QLoRAPlugin])) - set(fields_of([ModelConfig]))
    ours |= set(fields_of([RunArguments])) - set(fields_of([ScriptArguments]))
    assert ours <= set(NAMES)


@pytest.mark.parametrize("count", [2, 40])
def test_a_third_party_recipe_shows_its_own_options(capsys: pytest.CaptureFixture[str], count: int) -> None:
    own = [(f"reward_{index}", float, dataclasses.field(default=0.5)) for index in range(count)]
    config = dataclasses.make_dataclass("Config", own, bases=(SFTConfig,))
    config.__module__ = "theirs"
    lines = printed(capsys, config, "--help").splitlines()
    assert "this recipe's own:" in lines
    assert any(line.startswith("  --reward_1 ") and "0.5" in line for line in lines)
    assert len(lines) <= LINES


def test_all_options_are_listed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help", "all"], ["--help=all"], ["--seed", "x", "-h", "all"]):
        text = printed(capsys, SFTConfig, *argv)
        assert [name for name in fields_of(classes(SFTConfig)) if f"--{name}" not in text] == [], argv
    with pytest.raises(UserError, match="--help: takes no value but all"):
        parse("--help=some")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--help", "-h"):
        with pytest.raises(SystemExit) as caught:
            parse("--seed", "x", word, summary="Supervised fine-tuning")
        assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Supervised fine-tuning\n\nusage: halfbyte sft --config FILE")
    for name in ("--packing", "--lora_r", "--overwrite_output_dir", "--datasets"):
        assert name in printed
