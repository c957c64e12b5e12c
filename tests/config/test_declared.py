"""The stand-ins of option classes: what the classes declare, and none where the source does not show it."""

import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from halfbyte import recipe as recipes
from halfbyte.config.conversion import described
from halfbyte.config.declared import option_classes
from halfbyte.config.fields import fields_of
from tests import packages
from tests.config.test_help import SHIPPED, classes

# Choices that an expression or a table of another module makes: the class itself checks them.
LATE_CHOICES = {"log_level", "log_level_replica"}
LATE_TYPES = {"parallelism_config"}
LATE_DEFAULTS = {"optim"}


@pytest.mark.parametrize("recipe", SHIPPED)
def test_a_stand_in_declares_what_its_class_declares(recipe: str) -> None:
    found = option_classes(f"halfbyte_recipes.{recipe}:recipe")
    assert found is not None
    real = classes(recipes.load(recipe).config)
    assert [made.__name__ for made in found] == [made.__name__ for made in real]
    stand_ins, fields = fields_of(found), fields_of(real)
    assert list(stand_ins) == list(fields)
    for name, field in fields.items():
        own = stand_ins[name]
        assert own.help == field.help, name
        if name not in LATE_TYPES:
            assert described(own.type) == described(field.type), name
        if name not in LATE_DEFAULTS:
            default = field.default
            assert own.default == (default.value if isinstance(default, Enum) else default), name
        if name not in LATE_CHOICES:
            assert own.choices == field.choices, name


def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> dict[str, Any] | None:
    """The options of a third party's module ``code`` with their types; None where they are unclear."""
    monkeypatch.syspath_prepend(str(packages.write(tmp_path, "theirs", {}, code=code)))
    from halfbyte.config import declared as module

    module._bindings.cache_clear()
    module._stand_in.cache_clear()
    found = option_classes("theirs:recipe")
    assert "theirs" not in sys.modules
    return None if found is None else {name: field.type for name, field in fields_of(found).items()}


HEAD = """\
import dataclasses, trl
from dataclasses import dataclass, field
from typing import *
from trl import SFTConfig
"""
RECIPE = "\nrecipe = Recipe(config=Config, trainer=None, summary='')"


@pytest.mark.parametrize(
    ("code", "own"),
    [
        ("@dataclass\nclass Config(SFTConfig):\n    own: int = 3", int),
        ("@dataclasses.dataclass(kw_only=True)\nclass Config(trl.SFTConfig):\n    own: 'int' = field(default=3)", int),
        ("try:\n    from trl import SFTConfig as Base\nexcept ImportError:\n    Base = None\n"
         "@dataclass\nclass Config(Base):\n    own: list[str] = field(default_factory=list)", list[str]),
        ("@dataclass\nclass Config(SFTConfig):\n    own: unknown.Type = None", Any),
        ("@dataclass\nclass Config(SFTConfig):\n    own: int = field(default=3, init=False)", None),
        ("class Config(SFTConfig):\n    own: int = 3", None),
        ("@dataclass\nclass Config(SFTConfig):\n    own: ClassVar[int] = 3", None),
    ],
)  # fmt: skip
def test_a_third_party_s_options(tmp_path, monkeypatch, code: str, own: Any) -> None:
    found = declared(tmp_path, monkeypatch, HEAD + code + RECIPE)
    assert found is not None
    assert found.get("own") == own
    assert "learning_rate" in found


@pytest.mark.parametrize(
    "code",
    [
        "@register\n@dataclass\nclass Config(SFTConfig):\n    own: int = 3" + RECIPE,
        "Config = dataclasses.make_dataclass('Config', [], bases=(SFTConfig,))" + RECIPE,
        "class Config(SFTConfig, metaclass=Meta):\n    pass" + RECIPE,
        "@dataclass\nclass Config(Unknown):\n    own: int = 3" + RECIPE,
        "@dataclass\nclass Config(SFTConfig):\n    own: int = 3\nrecipe = make(Config)",
        "@dataclass\nclass Config(SFTConfig):\n    learning_rate: float = guess()" + RECIPE,
        "from theirs import Config" + RECIPE,
        "import nowhere\nfrom nowhere import recipe",
        "recipe = = 1",
        "recipe = Recipe(**parts)",
        "",
    ],
)
def test_what_the_source_does_not_show_is_left_to_the_import(tmp_path, monkeypatch, code: str) -> None:
    assert declared(tmp_path, monkeypatch, HEAD + code) is None
