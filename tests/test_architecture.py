"""The tree keeps its promises: imports run one way, files stay small, the plugin names no recipe."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "plugin" / "halfbyte"
RECIPES = ROOT / "recipes" / "halfbyte_recipes"

# Each room may import from halfbyte only what stands in a row above its own. The table of commands is data, which
# recipes must know: it stands on the lowest floor, the commands themselves near the top.
LAYERS = [
    {
        "errors",
        "files",
        "locks",
        "multimodal",
        "task",
        "caches",
        "store",
        "parts",
        "identity",
        "names",
        "state_kernels",
    }
    | {"commands table", "terminal"},
    {"config", "quantization", "adapters", "optimizers", "data", "distributed"},
    {"fast", "checkpoint", "resilience", "tracking", "memory"},
    {"trainer"},
    {"model_options", "precision", "init_kwargs", "unsupported"},
    {"resolve"},
    {"loading"},
    {"assembly", "given"},
    {"plugin"},
    {"recipe", "options", "bound"},
    {"plan", "export", "run", "demo"},
    {"commands"},
    {"cli", "__main__", "__init__"},
]
# Rows whose rooms may not import each other either.
SEPARATE = 1


def modules() -> list[Path]:
    return sorted(PLUGIN.rglob("*.py"))


def room(path: Path) -> str:
    inside = path.relative_to(PLUGIN).parts
    return "commands table" if inside == ("commands", "__init__.py") else inside[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(path: Path) -> set[str]:
    """The halfbyte rooms that ``path`` imports when it is run (not only for type checking)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            inner = node.module in ("halfbyte", "halfbyte.commands")
            found.update({f"{node.module}.{a.name}" for a in node.names} if inner else {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    public = {"QLoRAPlugin": "plugin", "Recipe": "recipe"}
    table = {"halfbyte.commands", "halfbyte.commands.TABLE"}
    rooms = {
        "commands table" if name in table else name.split(".")[1]
        for name in found
        if name.startswith("halfbyte.")
    }
    return {public.get(name, name) for name in rooms}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PLUGIN)))
def test_imports_run_one_way(path: Path) -> None:
    own = room(path)
    for other in imports(path) - {own}:
        assert layer(other) < layer(own) or (layer(other) == layer(own) and layer(own) != SEPARATE), (
            f"{path.relative_to(ROOT)} imports halfbyte.{other}"
        )


def test_the_plugin_imports_no_recipe() -> None:
    for path in modules():
        assert "halfbyte_recipes" not in path.read_text(encoding="utf-8"), path


def test_recipes_import_the_plugin_and_not_each_other() -> None:
    for path in RECIPES.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not any(name and name.startswith("halfbyte_recipes") for name in named), path


@pytest.mark.parametrize("path", [*modules(), *sorted(RECIPES.glob("*.py"))], ids=lambda p: p.name)
def test_files_are_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert path.name != "utils.py"
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


LIGHT = {
    "--help": 0,
    "recipes": 0,
    "recipes --json": 0,
    "doctor --help": 0,
    "demo --help": 0,
    "verify .": 2,
    "merge": 2,
    "runs": 2,
    "runs tests/tracking": 2,
    "plot --smooth 2 x": 2,
    "stf": 2,
    "sft --lr=3": 2,
    "sft --config no-such.yaml": 2,
}


@pytest.mark.parametrize("line", LIGHT)
def test_light_commands_and_early_refusals_import_nothing_heavy(line: str) -> None:
    code = (
        "import sys; from halfbyte.cli import main\n"
        "try: code = main(sys.argv[2:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "assert code == int(sys.argv[1]), code\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'numpy', 'wandb', 'datasets', 'halfbyte_recipes'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(LIGHT[line]), *line.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_the_options_we_add_are_a_frozen_list() -> None:
    from dataclasses import fields

    from trl import ModelConfig, ScriptArguments

    from halfbyte.config import RunArguments
    from halfbyte.plugin import QLoRAPlugin

    ours = {f.name for f in fields(QLoRAPlugin) if f.init} - {f.name for f in fields(ModelConfig)}
    assert ours == {
        "adapter_name_or_path",
        "additional_special_tokens",
        "fast",
        "init_lora_weights",
        "lora_exclude_modules",
        "loraplus_lr_ratio",
        "max_tokens_per_batch",
        "memory_budget",
    }
    assert {f.name for f in fields(RunArguments)} - {f.name for f in fields(ScriptArguments)} == {
        "allow_config_change",
        "on_nonfinite",
        "on_oom",
        "overwrite_output_dir",
        "peak_flops",
        "sample_max_new_tokens",
        "sample_prompts",
        "sample_steps",
        "user_special_tokens",
    }
