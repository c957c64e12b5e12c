"""What the YAML file and the command line show by themselves is refused before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from halfbyte import recipe as recipes
from halfbyte.config import collect, refuse_early
from halfbyte.config.fields import fields_of
from halfbyte.config.foreign import LAUNCHER_KEYS, RENAMED, reason
from halfbyte.errors import UserError
from tests.config.test_help import SHIPPED, classes

# Options of the launcher that are options of every recipe too, and its arguments that are no keys.
SHARED = {"debug", "gradient_accumulation_steps"}
NO_KEYS = {"help", "module", "training_script", "training_script_args", "role", "tee"}

HEAVY = "{'torch', 'transformers', 'trl', 'accelerate', 'numpy', 'datasets', 'halfbyte_recipes', 'rich'}"


def refused(*argv: str) -> str:
    """The refusal of ``halfbyte sft ARGV`` in a process that must not import anything heavy; "" if there is none."""
    code = (
        "import sys; from halfbyte import cli, recipe\n"
        "def load(name): raise SystemExit(0)\n"
        "recipe.load = load\n"
        "code = cli.main(['sft', *sys.argv[1:]])\n"
        f"assert not {HEAVY} & set(sys.modules), sys.modules.keys()\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr
    assert (done.returncode == 0) == (done.stderr == "halfbyte: loading PyTorch, Transformers and TRL ...\n")
    return done.stderr if done.returncode else ""


def test_everything_that_shows_at_once_is_refused_together_without_imports(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 3\nlora_r: 1\nlora_r: 2\nnum-processes: 3\nenv: {a: b}\n", encoding="utf-8")
    lines = refused("--config", str(file), "--lr", "3", "--seed", "1", "--seed=2").splitlines()
    assert lines[0] == f"error: {file}:1: epochs: unknown option; write num_train_epochs"
    assert lines[1] == f"{file}:3: lora_r: given twice (first at {file}:2); keep one"
    assert lines[2].startswith(f"{file}:4: num-processes: belongs to the launcher; write accelerate launch")
    assert lines[3].startswith(f"{file}:5: env: environment variables are set on the command line")
    assert sorted(lines[4:]) == [
        "--lr: unknown option; write learning_rate",
        "--seed: given twice (first at --seed); keep one",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1\n", "not valid YAML"),
        (b"seed: 1\nrun_name: \xff", "run.yaml:2: not UTF-8"),
        (b"- seed", "is a list"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_without_imports(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content)
    assert words in refused("--config", str(file))


def test_loading_is_reported_where_the_classes_are_needed(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rat: 1\n", encoding="utf-8")
    assert refused("--config", str(file)) == ""
    assert refused("--help") == ""


def test_a_third_party_recipe_may_have_an_option_of_any_name() -> None:
    written = collect(["--batch_size", "3", "--env", "x"])
    refuse_early(written, "halfbyte theirs", keys=False)
    with pytest.raises(
        UserError, match=r"--batch_size: unknown option; write per_device.*\n--env: environment"
    ):
        refuse_early(written, "halfbyte sft", keys=True)
    with pytest.raises(UserError, match="--batch-size: given twice"):
        refuse_early(collect(["--batch_size=1", "--batch-size=1"]), "halfbyte theirs", keys=False)


def test_at_most_ten_lines() -> None:
    options = [f"--{key}=1" for key in sorted(LAUNCHER_KEYS)]
    with pytest.raises(UserError) as caught:
        refuse_early(collect(options), "halfbyte sft", keys=True)
    lines = str(caught.value).splitlines()
    assert len(lines) == 10
    assert lines[-1] == f"... and {len(options) - 9} more"


def test_the_launcher_s_keys_are_accelerate_s() -> None:
    theirs = {action.dest for action in launch_command_parser()._actions} - NO_KEYS
    assert theirs - SHARED == LAUNCHER_KEYS & theirs
    assert {"nnodes", "nproc_per_node", "accelerate_config"} <= LAUNCHER_KEYS
    assert len(LAUNCHER_KEYS - theirs) == 5


@pytest.mark.parametrize("recipe", SHIPPED)
def test_no_option_of_a_recipe_is_foreign(recipe: str) -> None:
    known = fields_of(classes(recipes.load(recipe).config))
    assert set(known) >= SHARED
    assert [key for key in known if reason(key, "halfbyte sft") is not None] == []
    assert not RENAMED.keys() & known.keys()
