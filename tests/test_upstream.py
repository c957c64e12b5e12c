"""The canary: every upstream name that halfbyte overrides, replaces or relies on is as it was when it was listed."""

import importlib
import inspect
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from halfbyte import upstream
from halfbyte.trainer.compose import RUN
from halfbyte.upstream import OVERRIDES, PATCHES, PRIVATE


def found(name: str) -> Any:
    """The object of a dotted name: the longest importable module, then attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise AssertionError(f"{name} cannot be imported")


def parameters(name: str) -> str:
    return " ".join(inspect.signature(found(name)).parameters)


def check(name: str, expected: str) -> None:
    assert parameters(name) == expected, (
        f"{name} changed its signature: {parameters(name)!r} instead of {expected!r}"
    )


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda each: each.name)
def test_an_overridden_method_has_its_signature(override: upstream.Override) -> None:
    check(override.name, override.parameters)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda each: f"{each.name} in {each.place}")
def test_a_replaced_name_has_its_signature(patch: upstream.Patch) -> None:
    check(patch.name, patch.parameters)


@pytest.mark.parametrize("private", PRIVATE, ids=lambda each: f"{each.name} in {each.place}")
def test_a_private_name_is_there(private: upstream.Private) -> None:
    name, _, attribute = private.name.partition(":")
    if attribute:
        assert f"self.{attribute}" in inspect.getsource(found(name)), f"{name} sets no {attribute}"
    elif private.parameters:
        check(name, private.parameters)
    else:
        assert callable(found(name))


def test_the_list_has_every_method_that_a_mixin_overrides() -> None:
    overridden = {
        f"transformers.{cls.__name__}.{name}"
        for mixin in RUN
        for name, value in vars(mixin).items()
        for cls in (Trainer, TrainerCallback)
        if callable(value) and not name.startswith("__") and hasattr(cls, name)
    }
    assert {each.name for each in OVERRIDES} == overridden


def test_a_renamed_argument_is_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(self: Any, module: Any, trial: Any) -> None: ...

    monkeypatch.setattr(Trainer, "_save_checkpoint", renamed)
    with pytest.raises(AssertionError, match=r"transformers.Trainer._save_checkpoint changed its signature"):
        check("transformers.Trainer._save_checkpoint", "self model trial")
    monkeypatch.delattr(Trainer, "_save_checkpoint")
    with pytest.raises(AttributeError, match="_save_checkpoint"):
        check("transformers.Trainer._save_checkpoint", "self model trial")
