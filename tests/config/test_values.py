"""Python's values are checked as the command line's are: each field of the plugin, in one sentence that names it."""

import numpy
import pytest

from halfbyte import QLoRAPlugin
from halfbyte.config.fields import fields_of
from halfbyte.config.limits import range_for
from halfbyte.errors import UserError

FIELDS = fields_of([QLoRAPlugin])


def refusal(**given: object) -> str:
    with pytest.raises(UserError) as caught:
        QLoRAPlugin(**given)  # type: ignore[arg-type]
    assert caught.value.option in given
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_another_type(name: str) -> None:
    field = FIELDS[name]
    wrong: list[object] = [{"a": 1}, [[1]], [1.5], object()]
    if field.type in (int, float, float | None):
        wrong += ["16", True, float("nan"), float("inf")]
    if field.type is bool:
        wrong += ["true", 1, None]
    if field.type in (str, str | None, list[str] | None):
        wrong += [3, 1.5, True, [None]]
    if field.type is int:
        wrong += [3.5, None]
    for value in wrong:
        assert refusal(**{name: value}).startswith(f"{name}: must be ")


@pytest.mark.parametrize("name", [name for name in FIELDS if range_for(name, FIELDS[name].default)])
def test_a_value_out_of_range(name: str) -> None:
    assert refusal(**{name: -1}).startswith(f"{name}: must be ")


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.choices])
def test_a_value_that_is_no_choice(name: str) -> None:
    assert refusal(**{name: "another"}).startswith(f"{name}: 'another' is not supported; write one of ")


@pytest.mark.parametrize(
    "given",
    [
        {"lora_r": numpy.int64(4), "lora_dropout": numpy.float32(0.5), "lora_alpha": 8},
        {"lora_dropout": 0, "loraplus_lr_ratio": 16},
        {"lora_target_modules": "all-linear"},
        {"lora_target_modules": ["q_proj", "v_proj"], "lora_exclude_modules": ("lm_head",)},
        {"dtype": "bfloat16", "memory_budget": "20GiB", "fast": "none"},
    ],
)
def test_what_is_right_is_taken(given: dict[str, object]) -> None:
    assert QLoRAPlugin(**given)  # type: ignore[arg-type]
