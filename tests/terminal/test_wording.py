"""The nearest name and the first line: a slip is found, shared letters are not, and no sentence ends in a colon."""

import random

import pytest

from halfbyte import commands
from halfbyte import recipe as recipes
from halfbyte.config.fields import fields_of
from halfbyte.terminal.wording import first_line, nearest, suggestion
from tests.config.test_help import SHIPPED, classes

LETTERS = "abcdefghijklmnopqrstuvwxyz_"


@pytest.fixture(scope="module")
def options() -> list[str]:
    return sorted({name for recipe in SHIPPED for name in fields_of(classes(recipes.load(recipe).config))})


def slip(name: str, rng: random.Random) -> str:
    """One letter too many, too few, another one, or two swapped."""
    at, letter = rng.randrange(len(name)), rng.choice(LETTERS)
    return rng.choice(
        [
            name[:at] + letter + name[at:],
            name[:at] + name[at + 1 :],
            name[:at] + letter + name[at + 1 :],
            name[:at] + name[at + 1 : at + 2] + name[at : at + 1] + name[at + 2 :],
        ]
    )


@pytest.mark.parametrize(("slips", "length", "share"), [(1, 4, 0.98), (2, 11, 0.97)])
def test_slips_of_the_fingers_are_found(options: list[str], slips: int, length: int, share: float) -> None:
    rng = random.Random(slips)
    found = []
    for name in options:
        word = name
        for _ in range(slips):
            word = slip(word, rng)
        if len(name) >= length and word not in options:
            found.append(nearest(word, options) == name)
    assert len(found) > 100
    assert sum(found) >= share * len(found)


@pytest.mark.parametrize(
    "word",
    [
        "micro_batch_size",
        "batch_size",
        "base_model",
        "cutoff_len",
        "sequence_len",
        "val_set_size",
        "dataset_mixer",
        "max_samples",
        "r",
        "model",
        "data",
        "training",
        "template",
        "finetuning_type",
        "model_type",
        "sample_packing",
        "flash_attention",
        "scheduler",
        "precision",
        "wandb_project",
        "train_on_inputs",
        "tokenizer",
        "gpus",
        "learning",
    ],
)
def test_names_of_something_else_get_no_suggestion(options: list[str], word: str) -> None:
    assert suggestion(word, options) == ""


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("model_name", ["model_name_or_path"]),
        ("chat_template", ["chat_template_path"]),
        ("lora_target", ["lora_target_modules", "lora_target_parameters"]),
        ("accumulation_steps", ["eval_accumulation_steps", "gradient_accumulation_steps"]),
        ("gradient_checkpoint", ["gradient_checkpointing", "gradient_checkpointing_kwargs"]),
    ],
)
def test_a_part_of_few_names_shows_them_all(options: list[str], word: str, names: list[str]) -> None:
    assert suggestion(word, options) == f"; did you mean {' or '.join(names)}?"


@pytest.mark.parametrize(
    ("word", "name"),
    [
        *(("stf", "sft"), ("dop", "dpo"), ("spt", "sft"), ("recipe", "recipes"), ("dcotor", "doctor")),
        *(("vrify", "verify"), ("chache", "cache"), ("pre_train", "pretrain"), ("quantise", "quantize")),
        *(
            (word, None)
            for word in ("rloo", "version", "train", "ls", "list", "distill", "classify", "s", "")
        ),
    ],
)
def test_commands_and_recipes(word: str, name: str | None) -> None:
    assert nearest(word, [*SHIPPED, *commands.TABLE]) == name


@pytest.mark.parametrize(
    ("said", "first"),
    [
        ("", "ValueError"),
        ("one\ntwo", "one"),
        ("one,\ntwo", "one,"),
        ("one of:\n\n  (1) a file,\n(2) a class\nYou need both", "one of: (1) a file, (2) a class"),
        ("all of:\n" + "a name,\n" * 99, "all of: a name, a name, a name,"),
        ("nothing:", "nothing:"),
    ],
)
def test_a_first_line_goes_on_after_a_colon(said: str, first: str) -> None:
    assert first_line(ValueError(said)) == first
