"""Every block of every README works: commands parse, YAML is read strictly, Python trains a tiny model."""

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from halfbyte import QLoRAPlugin, run
from halfbyte import commands as table
from halfbyte import recipe as recipes
from halfbyte.recipe import Recipe
from tests import architectures, tiny
from tests.documentation.documents import DOCUMENTS, ROOT, Block, blocks, commands, title
from tests.documentation.generated import settings

ENVIRONMENT = {"WANDB_MODE": {"offline"}}

# What a user would write in place of a hub's name, here the tiny models and rows of the tests.
CHAT, STORIES, MODEL = '"trl-lib/Capybara"', '"roneneldan/TinyStories"', '"Qwen/Qwen3-8B"'
ADAPTER, MULTIMODAL = '"path/to/adapter"', '"Qwen/Qwen3-VL-8B-Instruct"'
# What a machine with a GPU does not need, and two steps for an epoch.
ON_A_CPU = (
    ("SFTConfig(", "SFTConfig(use_cpu=True, bf16=False, max_steps=2, "),
    ("QLoRAPlugin(", 'QLoRAPlugin(dtype="float32", '),
    ("Accelerator(", "Accelerator(cpu=True"),
)


def every(*languages: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", blocks(*languages), ids=str)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory like a clone's in which the YAML files that the READMEs show are written out."""
    for name in ("recipes", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks("yaml"):
        (tmp_path / title(block)).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in blocks()} == {"bash", "yaml", "toml", "python", "text"}
    for document in DOCUMENTS:
        fences = document.read_text(encoding="utf-8").count("```")
        assert fences == 2 * sum(block.document == document for block in blocks())


@pytest.mark.parametrize(("place", "command"), list(commands()))
def test_a_command_is_one_that_works(place: str, command: str, clone: Path) -> None:
    words = shlex.split(command)
    while (pair := words[0].partition("="))[1]:
        assert pair[2] in ENVIRONMENT[pair[0]]
        words.pop(0)
    program, rest = words[0], words[1:]
    assert program in COMMANDS, f"{place}: {program} is a command that no test knows"
    COMMANDS[program](rest)


def _make(words: list[str]) -> None:
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(words) == 1


def _halfbyte(words: list[str]) -> None:
    name, options = words[0], words[1:]
    if name in table.TABLE:
        assert {
            "recipes": [[], ["--json"]],
            "demo": [[]],
            "doctor": [["--launch", "launch/ddp.yaml"]],
            "merge": [["runs/my-dpo", "--output_dir", "models/my-chat"]],
            "plan": [
                ["sft", "--config", "my_sft.yaml", "--gpu", "24GB"],
                ["sft", "--config", "my_sft.yaml", "--preview", "3"],
                ["sft", "--config", "my_sft.yaml", "--gpu", "24GB x 2", "--launch", "launch/fsdp2.yaml"],
            ],
            "plot": [
                ["runs", "--metric", "loss", "--output", "loss.png"],
                ["runs", "--metric", "loss", "rewards/margins", "--dark", "--output", "curves.svg"],
                ["runs/my-sft"],
            ],
            "quantize": [["models/my-base", "--output_dir", "models/my-base-nf4"]],
            "report": [["models/my-base", "--data", "data/chat", "--recipe", "sft"]],
            "runs": [["runs"], ["runs", "--sort", "eval_loss", "--where", "recipe=sft", "status=completed"]],
        }[name].count(options)
    elif options[0] == "--help":
        assert options[1:] in ([], ["all"])
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
    """.ci/run takes the test command from the root's README."""
    texts = [block.text for block in blocks("bash") if block.document == ROOT / "README.md"]
    assert "make demo\n" in texts
    assert "make test\n" in texts


@every("yaml")
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


@every("toml")
def test_an_entry_point_is_in_our_group(block: Block) -> None:
    (names,) = tomllib.loads(block.text)["project"]["entry-points"].values()
    assert list(tomllib.loads(block.text)["project"]["entry-points"]) == [recipes.GROUP]
    for name, place in names.items():
        assert f"halfbyte {name} --config" in block.document.read_text(encoding="utf-8")
        assert place.endswith(":recipe")


@every("python")
def test_python_runs_on_a_tiny_model(
    block: Block, model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chat = tiny.write_rows(tmp_path / "chat", tiny.conversations(20))
    stories = tiny.write_rows(tmp_path / "stories", tiny.texts(20))
    program = block.text
    given = [(MODEL, str(model_dir("llama"))), (CHAT, chat), (STORIES, stories)]
    if MULTIMODAL in program:
        given.append((MULTIMODAL, architectures.save(tmp_path / "multimodal", "qwen3_vl")))
    if ADAPTER in program:
        given.append((ADAPTER, str(tmp_path / "adapter")))
        QLoRAPlugin(dtype="float32").load(str(model_dir("llama"))).save_pretrained(tmp_path / "adapter")
    for shown, here in (*given, *ON_A_CPU):
        program = program.replace(shown, here if shown in dict(ON_A_CPU) else repr(here))
    module = ModuleType("readme")
    exec(compile(program, str(block), "exec"), module.__dict__)
    if isinstance(defined := vars(module).get("recipe"), Recipe):
        prompts = tiny.write_rows(tmp_path / "prompts", [{"prompt": tiny.text(n)} for n in range(20)])
        _train(defined, str(model_dir("llama")), prompts, tmp_path / "run")
        written = tmp_path / "run"
    else:
        (written,) = (tmp_path / "runs").iterdir()
    weights = "model.safetensors" if ADAPTER in block.text else "adapter_model.safetensors"
    assert (written / weights).stat().st_size > 0


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
