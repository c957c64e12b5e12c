"""The canary: every upstream name that halfbyte overrides, replaces or relies on is as it was when it was listed."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from halfbyte import upstream
from halfbyte.trainer.compose import RUN
from halfbyte.upstream import OVERRIDES, PATCHES
from halfbyte.upstream_private import PRIVATE, Private


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
    if patch.parameters:
        check(patch.name, patch.parameters)
    else:
        pytest.importorskip(patch.name.partition(".")[0], reason="an extra that is not installed")
        assert found(patch.name.rpartition(".")[0])


@pytest.mark.parametrize("patch", PATCHES, ids=lambda each: f"{each.name} in {each.place}")
def test_a_place_is_a_function_in_a_file(patch: upstream.Patch) -> None:
    file, _, function = patch.place.partition(":")
    nodes = ast.walk(ast.parse((PLUGIN / file).read_text(encoding="utf-8")))
    defined = {each.name for each in nodes if isinstance(each, ast.FunctionDef | ast.ClassDef)}
    assert function.rpartition(".")[2] in defined


@pytest.mark.parametrize("private", PRIVATE, ids=lambda each: f"{each.name} in {each.place}")
def test_a_private_name_is_there(private: Private) -> None:
    name, _, attribute = private.name.partition(":")
    if attribute:
        source = inspect.getsource(found(name))
        assert f"self.{attribute}" in source or f'"{attribute}"' in source, f"{name} sets no {attribute}"
    elif private.parameters:
        check(name, private.parameters)
    else:
        assert found(name) is not None


def test_the_list_has_every_method_that_a_mixin_overrides() -> None:
    overridden = {
        f"transformers.{cls.__name__}.{name}"
        for mixin in RUN
        for name, value in vars(mixin).items()
        for cls in (Trainer, TrainerCallback)
        if callable(value) and not name.startswith("__") and hasattr(cls, name)
    }
    assert {each.name for each in OVERRIDES} == overridden


PLUGIN = Path(upstream.__file__).parent
STANDARD = {"os", "sys"}  # os._exit and sys._current_frames are documented


def foreign_private(path: Path) -> Iterator[tuple[str, bool]]:
    """Private names of other libraries in a module: read or imported (False), or assigned to (True)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("halfbyte"):
            yield from ((alias.name, False) for alias in node.names if alias.name.startswith("_"))
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
            continue
        owner = ast.unparse(node.value)
        own = owner in {"self", "cls", "super()", *STANDARD} or node.attr.startswith("__")
        if not own and not owner.startswith("super("):
            yield node.attr, not isinstance(node.ctx, ast.Load)


def test_no_private_name_of_another_library_is_used_that_is_not_listed() -> None:
    listed = {(each.name.rpartition(":")[2].rpartition(".")[2], each.place) for each in PRIVATE}
    assigned = {(each.name.rpartition(".")[2], each.place.partition(":")[0]) for each in PATCHES}
    for path in PLUGIN.rglob("*.py"):
        place = path.relative_to(PLUGIN).as_posix()
        for name, is_assigned in foreign_private(path):
            assert (name, place) in (assigned if is_assigned else listed | assigned), f"{place} uses {name}"


def replaced(path: Path) -> Iterator[str]:
    """Attributes that a module assigns on what is not its own: methods, classes and functions of other objects."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in (each for group in targets for each in ast.walk(group)):
            stored = isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
            if stored and target.attr in METHODS and ast.unparse(target.value) != "self":
                yield target.attr


METHODS = {
    "__class__",
    "add_adapter",
    "evaluate",
    "forward",
    "fsdp2_prepare_model",
    "get_train_dataloader",
    "save",
    "save_model",
    "training_step",
    *(each.name.rpartition(".")[2] for each in (*OVERRIDES, *PATCHES)),
}


def test_methods_of_other_objects_are_replaced_at_the_listed_places_only() -> None:
    listed = {(each.place.partition(":")[0], each.name.rpartition(".")[2]) for each in PATCHES}
    found = {
        (path.relative_to(PLUGIN).as_posix(), name)
        for path in PLUGIN.rglob("*.py")
        for name in replaced(path)
    }
    assert found <= listed, found - listed


def test_a_renamed_argument_is_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(self: Any, module: Any, trial: Any) -> None: ...

    monkeypatch.setattr(Trainer, "_save_checkpoint", renamed)
    with pytest.raises(AssertionError, match=r"transformers.Trainer._save_checkpoint changed its signature"):
        check("transformers.Trainer._save_checkpoint", "self model trial")
    monkeypatch.delattr(Trainer, "_save_checkpoint")
    with pytest.raises(AttributeError, match="_save_checkpoint"):
        check("transformers.Trainer._save_checkpoint", "self model trial")
