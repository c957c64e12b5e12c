"""Every option of TRL's classes is reachable from YAML and the command line, with TRL's meaning."""

import dataclasses
import inspect
import json
import typing
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from trl import DPOConfig, DPOTrainer, GRPOConfig, KTOConfig, ModelConfig, RewardConfig, SFTConfig
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, TrlParser

from halfbyte.config import RunArguments, read
from halfbyte.config.conversion import members
from halfbyte.config.fields import Field, fields_of
from halfbyte.config.limits import CHOICES, COUNTS, DPO_LOSSES, RANGES, range_for
from halfbyte.errors import UserError

CLASSES: tuple[type, ...] = (
    SFTConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    RewardConfig,
    ModelConfig,
    RunArguments,
    DatasetMixtureConfig,
)
BASE = (RunArguments, ModelConfig, DatasetMixtureConfig)


def sample(field: Field, hint: Any = None) -> Any:
    """A value that the field takes and that is not its default."""
    hint = hint or field.type
    for kind in members(hint):
        origin = typing.get_origin(kind) or kind
        if origin is list:
            item = (*typing.get_args(kind), str)[0]
            if field.choices and str in members(hint):
                continue
            return ["one", "two words"] if item is str and not field.choices else [sample(field, item)]
        if origin is DatasetConfig:
            return {"path": "some/rows", "split": "train", "columns": ["text"], "fraction": 0.5}
        if dataclasses.is_dataclass(origin):
            return {"tp_size": 1}
        if origin is dict:
            value = (*typing.get_args(kind), Any, Any)[1]
            return (
                {"alpha": True}
                if value is bool
                else {"alpha": 1, "beta": [0.5, None], "gamma": {"delta": "no way"}}
            )
    if field.choices and int not in members(hint):
        return next(choice for choice in reversed(field.choices) if choice not in (field.default, None))
    if bool in members(hint):
        return field.default is not True
    for kind, values in ((int, (3, 1)), (float, (0.25, 0.75, 3.5)), (str, ("some words: 1",))):
        if kind in members(hint):
            limit = range_for(field.name, field.default)
            return next(v for v in values if v != field.default and (kind is str or not limit or limit[1](v)))
    raise AssertionError(f"no sample for {hint}")


def expected(field: Field, value: Any) -> Any:
    if field.name == "datasets":
        return [DatasetConfig(**item) for item in value]
    record = next((kind for kind in members(field.type) if dataclasses.is_dataclass(kind)), None)
    return record(**value) if record else value


def words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [word for item in value for word in words(item)]
    return [str(value)]


@pytest.mark.parametrize("owner", CLASSES)
def test_every_field_reads_alike_from_yaml_and_command_line(owner: type, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for name, field in fields_of([owner]).items():
        value = sample(field)
        assert value != field.default
        file.write_text(yaml.safe_dump({name: value}))
        also = ["--use_peft"] if name == "load_in_4bit" else []
        for argv in (["--config", str(file)], [f"--{name}", *words(value)]):
            settings = read([*argv, *also], [owner], prog="halfbyte test")
            assert settings[name] == expected(field, value), name
            assert type(settings[name]) is type(expected(field, value)), name
            assert name in settings.given
            json.dumps(settings.resolved())


def test_no_field_is_left_out() -> None:
    for owner in CLASSES:
        declared = {item.name for item in dataclasses.fields(owner) if item.init}
        assert set(fields_of([owner])) == declared


@pytest.mark.parametrize("owner", [SFTConfig, DPOConfig, ModelConfig, RunArguments, DatasetMixtureConfig])
def test_scalars_and_lists_read_as_trl_reads_them(owner: type) -> None:
    parser = TrlParser([owner], allow_abbrev=False)
    compared = 0
    for name, field in fields_of([owner]).items():
        value = sample(field)
        if isinstance(value, dict) or name == "datasets":
            continue
        if isinstance(value, list) and str in members(field.type):
            value = value[0]
        if name == "include_num_input_tokens_seen":
            value = "yes"  # TRL's parser knows only its two boolean values
        # `--fsdp true` is a text for TRL, which then turns FSDP on whatever it says; the bare flag is not
        argv = ["--fsdp"] if name == "fsdp" else [f"--{name}", *words(value)]
        theirs = getattr(parser.parse_args(argv), name)
        ours = read([*argv, "--use_peft"] if name == "load_in_4bit" else argv, [owner], prog="x")[name]
        if name == "pad_to_multiple_of":
            theirs = int(theirs)  # as TRL's __post_init__ does
        ours, theirs = (got if isinstance(got, list) else [got] for got in (ours, theirs))
        assert ours == [item.value if isinstance(item, Enum) else item for item in theirs], name
        compared += 1
    assert compared >= 2


def test_defaults_are_the_classes_own() -> None:
    settings = read([], [SFTConfig, *BASE], prog="x")
    for name, field in fields_of([SFTConfig, *BASE]).items():
        assert settings[name] == field.default
    assert settings["learning_rate"] == SFTConfig.learning_rate
    assert not settings.given


def test_redeclared_fields_keep_their_choices_and_help() -> None:
    @dataclasses.dataclass
    class Changed(ModelConfig):
        dtype: str | None = None

    field = fields_of([Changed])["dtype"]
    assert field.default is None
    assert "bfloat16" in field.choices
    assert field.help


def test_dpo_names_are_those_of_the_trainer() -> None:
    source = inspect.getsource(inspect.getmodule(DPOTrainer))  # type: ignore[arg-type]
    for name in DPO_LOSSES:
        assert f'loss_type == "{name}"' in source
    assert source.count("if loss_type ==") == len(DPO_LOSSES)
    for name in CHOICES["f_divergence_type"]:
        assert f'self.f_divergence_type == "{name}"' in source
    assert source.count("if self.f_divergence_type ==") == len(CHOICES["f_divergence_type"])


def test_every_range_holds_for_some_field_and_every_default() -> None:
    known = (
        fields_of(CLASSES)
        | fields_of([GRPOConfig])
        | fields_of([DPOConfig])
        | fields_of([KTOConfig, RewardConfig])
    )
    for _, _, names in RANGES:
        for name in set(names.split()) - {"loraplus_lr_ratio", "max_tokens_per_batch"}:
            assert name in known, name
    for owner in CLASSES:
        for name, field in fields_of([owner]).items():
            if isinstance(field.default, int | float) and any(
                name in names.split() for _, _, names in RANGES
            ):
                assert range_for(name, field.default) is not None, f"{owner.__name__}.{name}"
    assert set(COUNTS) <= set(known)


def test_types_that_only_third_parties_use(tmp_path: Path) -> None:
    class Colour(Enum):
        RED = 1
        BLUE = 2

    @dataclasses.dataclass
    class ThirdParty:
        colour: Colour = Colour.RED
        mode: Literal["fast", "exact"] = "fast"
        path: Path | str = "here"
        folder: Path | None = None
        table: dict[str, float] = dataclasses.field(default_factory=dict)
        pairs: list[list[int]] = dataclasses.field(default_factory=list)

    file = tmp_path / "s.yaml"
    file.write_text(
        "colour: 2\nmode: exact\npath: there\nfolder: x/y\ntable: {a: 1e-3}\npairs: [[1, 2], [3]]\n"
    )
    settings = read(["--config", str(file)], [ThirdParty], prog="x")
    (built,) = settings.build()
    assert built == ThirdParty(Colour.BLUE, "exact", "there", Path("x/y"), {"a": 0.001}, [[1, 2], [3]])
    assert settings.resolved()["colour"] == 2
    assert settings.resolved()["folder"] == "x/y"


def test_reserved_names() -> None:
    @dataclasses.dataclass
    class Reserved:
        config: str | None = None

    with pytest.raises(UserError, match="reserved"):
        read([], [Reserved], prog="x")
