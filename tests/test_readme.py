"""README.md is true: its commands parse, its YAML reads, its Python runs, its tables are the code's."""

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from halfbyte import adapters, run
from halfbyte import recipe as recipes
from halfbyte.commands import demo
from halfbyte.config import RunArguments, Settings, read
from halfbyte.config.fields import fields_of
from halfbyte.data import PreferencePairs, Text
from halfbyte.plugin import QLoRAPlugin
from halfbyte.recipe import Recipe
from tests import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
UPSTREAM = {"sft": SFTConfig, "dpo": DPOConfig, "pretrain": SFTConfig}
ENVIRONMENT = {"WANDB_MODE": {"offline"}}

# What a stranger would write in place of a hub's name, here the tiny models and rows of the tests.
CHAT, STORIES, MODEL = '"trl-lib/Capybara"', '"roneneldan/TinyStories"', '"Qwen/Qwen3-8B"'
# What a machine with a GPU does not need, and two steps for an epoch.
ON_A_CPU = (
    ("SFTConfig(", "SFTConfig(use_cpu=True, bf16=False, max_steps=2, "),
    ("QLoRAPlugin(", 'QLoRAPlugin(dtype="float32", '),
    ("Accelerator(", "Accelerator(cpu=True"),
)


@dataclass(frozen=True)
class Block:
    """One fenced block of README.md, with the line it starts at."""

    line: int
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    found = re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", README, re.MULTILINE)
    all_blocks = [Block(README[: m.start()].count("\n") + 1, m[1], m[2]) for m in found]
    return [block for block in all_blocks if not languages or block.language in languages]


def named(*languages: str) -> Any:
    return pytest.mark.parametrize("block", blocks(*languages), ids=lambda b: f"line{b.line}")


def commands() -> Iterator[tuple[int, str]]:
    """Every command line with its line in README.md, continued lines joined."""
    for block in blocks("bash"):
        joined = block.text.replace("\\\n", "")
        yield from ((block.line, line) for line in joined.splitlines() if line and not line.startswith("#"))


def settings(name: str, *options: str) -> Settings:
    """What ``halfbyte NAME OPTIONS`` reads, exactly as train.py does."""
    recipe = recipes.load(name)
    classes = (RunArguments, recipe.config, QLoRAPlugin, DatasetMixtureConfig)
    return read(options, classes, prog=name, defaults=run.training_defaults(recipe.config))


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory like a clone's in which the YAML files that README shows are written out."""
    for name in ("recipes", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks("yaml"):
        (tmp_path / title(block)).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def title(block: Block) -> str:
    """The file name that a block's first line gives."""
    found = re.match(r"# (\w+\.yaml)\n", block.text)
    assert found, f"README.md:{block.line}: the first line of a YAML block names its file"
    return found[1]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in blocks()} == {"bash", "yaml", "toml", "python", "text"}
    assert README.count("```") == 2 * len(blocks())


@pytest.mark.parametrize(("line", "command"), list(commands()))
def test_a_command_is_one_that_works(line: int, command: str, clone: Path) -> None:
    words = shlex.split(command)
    while (pair := words[0].partition("="))[1]:
        assert pair[2] in ENVIRONMENT[pair[0]]
        words.pop(0)
    program, rest = words[0], words[1:]
    assert program in COMMANDS, f"README.md:{line}: {program} is a command that no test knows"
    COMMANDS[program](rest)


def _make(words: list[str]) -> None:
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(words) == 1


def _halfbyte(words: list[str]) -> None:
    name, options = words[0], words[1:]
    if name == "recipes":
        assert options in ([], ["--json"])
    elif name == "demo":
        assert options == []
    elif options == ["--help"]:
        recipes.load(name)
    else:
        read_settings = settings(name, *options)
        assert read_settings["output_dir"]
        assert read_settings["dataset_name"] or read_settings["datasets"]
        assert read_settings["model_name_or_path"] or read_settings["adapter_name_or_path"]


def _accelerate(words: list[str]) -> None:
    assert words[0] == "launch"
    arguments = launch_command_parser().parse_args(words[1:])
    assert Path(arguments.config_file).is_file()
    assert arguments.module
    assert arguments.training_script == "halfbyte"
    _halfbyte(arguments.training_script_args)


def _wandb(words: list[str]) -> None:
    from wandb.cli.cli import cli

    assert words[0] in cli.commands
    if words[0] == "sweep":
        assert Path(words[1]).is_file()


def _activate(words: list[str]) -> None:
    assert words == [".venv/bin/activate"]


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    ".": _activate,
    "accelerate": _accelerate,
    "halfbyte": _halfbyte,
    "make": _make,
    "wandb": _wandb,
}


def test_the_two_commands_stand_alone_on_their_lines() -> None:
    """.ci/run takes the test command from here."""
    texts = [block.text for block in blocks("bash")]
    assert "make demo\n" in texts
    assert "make test\n" in texts


@named("yaml")
def test_a_yaml_file_is_read_strictly(block: Block, clone: Path) -> None:
    loaded = yaml.safe_load(block.text)
    if "program" not in loaded:  # a configuration
        name = next(words.split()[1] for _, words in commands() if f"--config {title(block)}" in words)
        settings(
            name, "--config", title(block), "--use_cpu", "--bf16", "false", "--report_to", "none"
        ).build()
        return
    program, name, *options = loaded["command"]
    assert (loaded["program"], program, options.pop()) == ("halfbyte", "halfbyte", "${args}")
    for key, choice in loaded["parameters"].items():
        for value in choice.get("values", [choice.get("min"), choice.get("max")]):
            swept = settings(name, *options, f"--{key}={value}")
            assert swept[key] == value
    assert swept["eval_strategy"] != "no"
    assert swept["overwrite_output_dir"] is True


@named("toml")
def test_an_entry_point_is_in_our_group(block: Block) -> None:
    (names,) = tomllib.loads(block.text)["project"]["entry-points"].values()
    assert list(tomllib.loads(block.text)["project"]["entry-points"]) == [recipes.GROUP]
    for name, place in names.items():
        assert f"halfbyte {name} --config" in README
        assert place.endswith(":recipe")


@named("python")
def test_python_runs_on_a_tiny_model(
    block: Block, model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chat = tiny.write_rows(tmp_path / "chat", tiny.conversations(20))
    stories = tiny.write_rows(tmp_path / "stories", tiny.texts(20))
    program = block.text
    for shown, here in ((MODEL, str(model_dir("llama"))), (CHAT, chat), (STORIES, stories), *ON_A_CPU):
        program = program.replace(shown, here if shown in dict(ON_A_CPU) else repr(here))
    module = ModuleType("readme")
    exec(compile(program, f"README.md:{block.line}", "exec"), module.__dict__)
    if isinstance(defined := vars(module).get("recipe"), Recipe):
        prompts = tiny.write_rows(tmp_path / "prompts", [{"prompt": tiny.text(n)} for n in range(20)])
        _train(defined, str(model_dir("llama")), prompts, tmp_path / "run")
        written = tmp_path / "run"
    else:
        (written,) = (tmp_path / "runs").iterdir()
    assert (written / "adapter_model.safetensors").stat().st_size > 0


def _train(recipe: Recipe, model: str, rows: str, output: Path) -> None:
    """One step of GRPO with two short completions of one prompt."""
    options = {
        "max_steps": 1,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 4,
    }
    options |= {"dtype": "float32", "report_to": "none", "save_strategy": "no"}
    places = {"model_name_or_path": model, "dataset_name": rows, "output_dir": output}
    words = [word for key, value in {**places, **options}.items() for word in (f"--{key}", str(value))]
    assert run.main("brief", recipe, words) == 0


def table(*header: str) -> list[list[str]]:
    """The rows of the table whose header begins with ``header``, a list of cells each."""
    rows = re.search(
        rf"^\| {re.escape(' | '.join(header))}.*\|\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE
    )
    assert rows, f"README.md has no table {header}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_of_defaults_is_what_differs_from_trl_and_nothing_else() -> None:
    stated: dict[tuple[str, str], tuple[Any, Any]] = {}
    for option, upstream, ours, why in table("Option", "TRL", "halfbyte", "Why"):
        assert why
        name, *only = code(option)
        for recipe in only or UPSTREAM:
            stated[recipe, name] = (yaml.safe_load(code(upstream)[0]), yaml.safe_load(code(ours)[0]))
    differing = {}
    for recipe, config in UPSTREAM.items():
        ours, theirs = (
            settings(recipe),
            fields_of((ScriptArguments, ModelConfig, DatasetMixtureConfig, config)),
        )
        for name, field in theirs.items():
            if field.default != ours[name]:
                differing[recipe, name] = (field.default, ours[name])
    # YAML alone reads 5e-06 as text; halfbyte reads a number.
    numbers = {key: tuple(map(_number, values)) for key, values in stated.items()}
    assert numbers == differing


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+e-\d+", value) else value


def test_the_table_of_added_options_is_complete() -> None:
    theirs = fields_of((ScriptArguments, ModelConfig))
    added = {name: f for name, f in fields_of((RunArguments, QLoRAPlugin)).items() if name not in theirs}
    stated = {
        code(row[0])[0]: yaml.safe_load(code(row[1])[0])
        for row in table("Added option", "Default", "Meaning")
    }
    assert stated == {name: field.default for name, field in added.items()}


def test_every_option_in_code_marks_exists() -> None:
    """``name: value`` and ``--name`` in the prose are options of a shipped recipe or of the launcher."""
    known = set()
    for name in UPSTREAM:
        known |= set(settings(name).resolved())
    prose = re.sub(r"^```(?:.*\n)*?```$", "", README, flags=re.MULTILINE)
    named = {name for mark in code(prose) for name in re.findall(r"^(\w+): ", mark)}
    for command in (mark for mark in code(prose) if mark.startswith(("--", "halfbyte ", "accelerate "))):
        named |= set(re.findall(r"--(\w+)", command))
    launcher = {action.dest for action in launch_command_parser()._actions}
    assert len(named & known) > 10
    # `--key=value` is any option, and these are not options of a configuration.
    assert named - known - launcher <= {"all", "config", "debug", "env", "help", "key", "launch"}


def test_the_table_of_columns_is_the_layouts_in_their_order() -> None:
    stated: dict[str, list[str]] = {"sft": [], "dpo": []}
    recipe = ""
    for recipe_cell, columns, _ in table("Recipe", "Columns", "What they hold"):
        recipe = code(recipe_cell)[0] if recipe_cell else recipe
        stated[recipe].append(" + ".join(code(columns)))
    assert stated["sft"] == [str(layout) for layout in Text.layouts]
    assert stated["dpo"] == [str(layout) for layout in PreferencePairs.layouts]


def test_refused_initializations_are_all_named() -> None:
    (row,) = [row for row in table("What", "Why") if "init_lora_weights" in row[0]]
    assert set(code(row[0])[1:]) == set(adapters.REFUSED_INITIALIZATIONS)
    (row,) = [row for row in table("Added option") if "init_lora_weights" in row[0]]
    assert set(code(row[2])) == set(adapters.INITIALIZATIONS)


def test_announced_commands_are_all_named() -> None:
    (listed,) = re.findall(r"announced but not in this version: ([^.]*)\.", README)
    assert set(code(listed)) == recipes.COMMANDS - {"recipes", "demo", "doctor", "cache", "verify"}
    assert callable(demo.main)


def tree() -> Iterator[Path]:
    """Every path of the tree that README shows, each of which has its gloss in one line."""
    (block,) = blocks("text")
    directory = ROOT
    for line in block.text.splitlines():
        entry, gloss = re.split(r" {2,}", line.lstrip(), maxsplit=1)
        assert gloss, f"{entry} has no gloss"
        entry = entry.partition(" -> ")[0]
        depth = (len(line) - len(line.lstrip())) // 2
        if depth == 0:
            directory = top = ROOT / entry
            yield directory
        elif depth == 1:
            directory = top / entry if entry.endswith("/") else top
            yield top / entry
        else:
            yield directory / entry


def test_the_tree_glosses_every_file_and_only_those() -> None:
    shown = list(tree())
    assert len(shown) == len(set(shown))
    assert [str(path) for path in shown if not path.exists()] == []
    kinds = ("*.py", "*.yaml", "*.jinja", "py.typed")
    rooms = [ROOT / "plugin" / "halfbyte", ROOT / "recipes" / "halfbyte_recipes", ROOT / "launch"]
    files = {path for room in rooms for kind in kinds for path in room.rglob(kind)}
    files = {path for path in files if (ROOT / "plugin" / "halfbyte" / "launch") not in path.parents}
    assert sorted(str(path.relative_to(ROOT)) for path in files - set(shown)) == []


def test_links_point_at_something() -> None:
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", README, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or target.removeprefix("#") in headings, target
