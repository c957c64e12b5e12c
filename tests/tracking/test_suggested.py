"""The commands that a run suggests are what a shell reads back as they were meant."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte import recipe as recipes
from halfbyte.tracking import again_command, next_command, resume_command
from tests.config.test_help import SHIPPED

ODD = [
    "a b",
    "it's",
    'a"b',
    "$HOME",
    "`id`",
    "a;b",
    "a&b",
    "a*",
    "~x",
    "[a,b]",
    "<doc>",
    "a\\b",
    "é",
    "#x",
    "!x",
]
# `halfbyte` in a shell, as a function that prints its words.
PRINTED = "import json, sys; print(json.dumps(sys.argv[1:]))"


def through_bash(command: str, cwd: Path) -> list[str]:
    """The words that ``halfbyte`` gets when ``command`` is pasted into bash in ``cwd``."""
    script = f'halfbyte() {{ "$PYTHON" -c "$PRINTED" "$@"; }}\n{command}'
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=cwd,
        env={"PYTHON": sys.executable, "PRINTED": PRINTED},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_pasted_into_bash_in_an_odd_directory(tmp_path: Path) -> None:
    directory = tmp_path / "it's $HOME of mine"
    directory.mkdir()
    output = str(directory / "run 1")
    argv = ["--output_dir", output, "--run_name=it's", "--additional_special_tokens", *ODD, "--seed", "3"]
    resumed = ["sft", *argv, "--resume_from_checkpoint", "auto"]
    assert through_bash(resume_command("sft", argv), directory) == resumed
    following = next_command(recipes.load("sft").next, output, "my base", adapter=True)
    assert following is not None
    assert through_bash(following, directory) == [
        *("dpo", "--adapter_name_or_path", output, "--dataset_name", "PREFERENCES"),
        *("--output_dir", f"{output}-dpo"),
    ]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("adapter", [True, False])
def test_every_next_of_a_shipped_recipe_is_one_word_a_value(odd: str, adapter: bool) -> None:
    for name in SHIPPED:
        template = recipes.load(name).next
        plain, quoted = (next_command(template, output, "base", adapter=adapter) for output in ("OUT", odd))
        assert (plain is None) == (template is None)
        if plain is not None and quoted is not None:
            assert shlex.split(quoted) == [word.replace("OUT", odd) for word in shlex.split(plain)]


@pytest.mark.parametrize(
    "given",
    [
        ["--resume_from_checkpoint", "out/checkpoint-3"],
        ["--resume_from_checkpoint=out/checkpoint-3"],
        ["--resume-from-checkpoint", "auto"],
        ["--overwrite_output_dir"],
        ["--overwrite_output_dir", "true"],
        ["--overwrite-output-dir=true", "--resume_from_checkpoint", "auto"],
    ],
)
def test_what_only_the_first_start_needed_is_left_out(given: list[str]) -> None:
    command = resume_command("dpo", ["--seed", "3", *given, "--packing"])
    assert shlex.split(command) == [
        *("halfbyte", "dpo", "--seed", "3", "--packing"),
        *("--resume_from_checkpoint", "auto"),
    ]


def test_a_run_that_saved_nothing_is_started_over() -> None:
    argv = ["--seed", "3", "--resume_from_checkpoint", "auto", "--packing"]
    assert shlex.split(again_command("sft", argv)) == [
        *("halfbyte", "sft", "--seed", "3", "--packing", "--overwrite_output_dir")
    ]


def test_secrets_are_left_out_of_every_word() -> None:
    secret = "hf_" + "a1B2" * 8
    argv = [f"--hub_token={secret}", "--hub-token", secret, "--run_name", "x", secret, "--a=b=c", "--no_x"]
    assert shlex.split(resume_command("sft", argv))[2:-2] == [
        *("--hub_token=***", "--hub-token", "***", "--run_name", "x", "***", "--a=b=c", "--no_x")
    ]
