"""The parts of the READMEs that are made from the code: tables of options, formats and support, the tree."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    KTOConfig,
    ModelConfig,
    RewardConfig,
    ScriptArguments,
    SFTConfig,
)
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig

from halfbyte import adapters, commands, run
from halfbyte import recipe as recipes
from halfbyte.config import RunArguments, Settings
from halfbyte.config.fields import Field, fields_of
from halfbyte.config.others import OTHERS
from halfbyte.data import PreferencePairs, ScoredPairs, Text, UnpairedPreferences
from halfbyte.distributed import support
from halfbyte.plugin import QLoRAPlugin
from halfbyte.recipe import Recipe
from tests import test_architecture
from tests.documentation.documents import ROOT

UPSTREAM = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "orpo": ORPOConfig,
    "cpo": CPOConfig,
    "pretrain": SFTConfig,
    "reward": RewardConfig,
}

# Why a default is not TRL's; a new difference must be given its reason here.
WHY = {
    "load_in_4bit": "QLoRA; `load_in_8bit: true` turns it off",
    "use_bnb_nested_quant": "double quantization of the QLoRA paper",
    "dtype": "unset, the device decides: bfloat16 from compute capability 8.0, float16 with a gradient scaler below "
    "it, and on a CPU the faster of bfloat16 and float32 by a short timing, kept in the user's cache; `bf16` and "
    "`fp16` follow it",
    "use_peft": "a 4-bit base trains only through adapters",
    "lora_target_modules": "the QLoRA paper: all linear layers of the decoder, not the output head",
    "lora_dropout": "less work in each step; dropout works when it is set",
    "optim": "the paper's; off CUDA `adamw_torch` takes its place, and that is printed",
    "gradient_checkpointing_kwargs": "reentrant checkpointing fails under DDP",
    "ddp_find_unused_parameters": "adapters take part in every step",
    "report_to": "with a W&B login or `WANDB_MODE=offline`; without either nothing is reported, and that is printed",
    "learning_rate": "TRL's own LoRA examples",
    "lora_task_type": "a model with a head of one output",
    "precompute_ref_log_probs": "unset: once and cached, where there is more than one epoch of pairs or they are "
    "cached already; else in every step, which costs the same; the decision is printed",
    "packing": "running text needs no padding",
    "packing_strategy": "`bfd` drops what is longer than a row",
}
HELD = {
    "input_ids": "token ids",
    "prompt + completion": "both text or both messages; the loss is on the completion",
    "messages": "a conversation; `assistant_only_loss: true` puts the loss on the assistant's turns",
    "text": "text; `dataset_text_field` names another column",
    "prompt + chosen + rejected": "all text or all messages",
    "chosen + rejected": "the prompt is what both begin with",
    "prompt + chosen + rejected + margin": "`margin`, a number: by how much `chosen` should score above `rejected`",
    "chosen + rejected + margin": "the same without a prompt",
    "prompt + completion + label": "a completion and whether it is wanted, `true` or `false`",
}
ALONE = "`chosen` + `rejected`"
RECIPE = {
    "config": "a config class of TRL or a subclass",
    "trainer": "a trainer class of TRL or a subclass",
    "summary": "one sentence for `--help`",
    "data": "the format of its rows: every row is checked and counted",
    "task": "what the base is loaded as: `CAUSAL_LM` (default), `SEQUENCE_CLASSIFICATION` or `SEQ2SEQ` of "
    "`halfbyte.task`",
    "figures": "what log lines, plots, card and closing summary show, from `halfbyte.tracking.figures`",
    "fast": "which parts of the fast step may apply: `linears`, `layers`, `head`, `padding_free`",
    "build": "`build(config, plugin, data)` makes the trainer where the default is not enough",
    "next": "the command to suggest when the run is over",
}


def settings(name: str, *options: str) -> Settings:
    """What ``halfbyte NAME OPTIONS`` reads, exactly as run.py does."""
    return run.read(name, recipes.load(name), list(options))


def regenerated(text: str) -> str:
    """``text`` with every generated region made anew."""

    def region(match: re.Match[str]) -> str:
        return f"<!-- generated: {match[1]} -->\n{REGIONS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->\n(?:.*\n)*?<!-- end -->", region, text)


def table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def differing() -> dict[str, dict[str, tuple[Any, Any]]]:
    """Options whose default is not TRL's: by name, for each recipe, TRL's and ours."""
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    for recipe, config in UPSTREAM.items():
        ours = settings(recipe)
        for name, field in fields_of((ScriptArguments, ModelConfig, DatasetMixtureConfig, config)).items():
            if field.default != ours[name]:
                found.setdefault(name, {})[recipe] = (field.default, ours[name])
    return found


def defaults() -> str:
    rows = []
    for name, by_recipe in differing().items():
        values: dict[tuple[str, str], list[str]] = {}
        for recipe, (theirs, ours) in by_recipe.items():
            values.setdefault((_value(theirs), _value(ours)), []).append(recipe)
        for (theirs, ours), named in values.items():
            only = "" if len(named) == len(UPSTREAM) else f" ({', '.join(f'`{each}`' for each in named)})"
            rows.append((f"`{name}`{only}", theirs, ours, WHY[name]))
    return table(("Option", "TRL", "halfbyte", "Why"), iter(rows))


def added() -> dict[str, Field]:
    theirs = fields_of((ScriptArguments, ModelConfig))
    return {name: f for name, f in fields_of((RunArguments, QLoRAPlugin)).items() if name not in theirs}


def options() -> str:
    rows = ((f"`{name}`", _value(field.default), field.help) for name, field in added().items())
    return table(("Added option", "Default", "Meaning"), rows)


def formats() -> str:
    rows = []
    for named, format in (
        ("`sft`, `pretrain`", Text),
        ("`dpo`, `orpo`, `cpo`", PreferencePairs),
        ("`kto`", UnpairedPreferences),
        ("`reward`", ScoredPairs),
    ):
        for number, layout in enumerate(format.layouts):
            columns = " + ".join(f"`{column}`" for column in layout.columns)
            held = (
                "each side is scored as it stands"
                if named == "`reward`" and columns == ALONE
                else HELD[str(layout)]
            )
            rows.append((named if number == 0 else "", columns, held))
    return table(("Recipe", "Columns", "What they hold"), iter(rows))


def initializations() -> str:
    allowed = ", ".join(f"`{name}`" for name in adapters.INITIALIZATIONS)
    rows = [(allowed, "supported: the logits of the base do not change")]
    rows += [(f"`{name}`", f"refused: {why}") for name, why in adapters.REFUSED_INITIALIZATIONS.items()]
    return table(("Initialization", "On a 4-bit base"), iter(rows))


def recipe() -> str:
    return table(("Field", "Meaning"), ((f"`{f.name}`", RECIPE[f.name]) for f in fields(Recipe)))


def command_table() -> str:
    rows = ((f"`{each.usage}`", each.summary) for each in commands.TABLE.values())
    return table(("Command", "What it does"), rows)


def yamls() -> str:
    files = sorted((ROOT / "recipes" / "halfbyte_recipes").glob("*.yaml"))
    return table(("File", "What it is for"), ((f"`{path.name}`", first_comment(path)) for path in files))


def others() -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    systems: dict[tuple[str, str], list[str]] = {}
    for name, other in OTHERS.items():
        at = (other.example(), other.why)
        rows.setdefault(at, []).append(f"`{name}`")
        systems[at] = list(dict.fromkeys([*systems.get(at, []), *other.systems]))
    lines = (
        (", ".join(names), ", ".join(systems[at]), _instead(*at).replace("|", "\\|"))
        for at, names in rows.items()
    )
    return table(("Option", "Of", "Here"), lines)


def _instead(line: str, why: str) -> str:
    return f"`{line}`{f'; {why}' if why else ''}" if line else why


def launch_files() -> str:
    files = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".yaml", ".sh"))
    return table(("File", "What it starts"), ((f"`{path.name}`", first_comment(path)) for path in files))


def floors() -> str:
    lines = [", ".join(sorted(layer)) for layer in test_architecture.LAYERS]
    return "```text\n" + "\n  <- ".join(lines) + "\n```"


def tree() -> str:
    lines = []
    for top in (ROOT / "plugin" / "halfbyte", ROOT / "recipes" / "halfbyte_recipes"):
        lines += [f"{top.relative_to(ROOT)}/", *_entries(top, 1)]
    width = max(len(line.partition("\t")[0]) for line in lines) + 2
    shown = [
        f"{name:<{width}}{gloss}".rstrip() for name, _, gloss in (line.partition("\t") for line in lines)
    ]
    return "```text\n" + "\n".join(shown) + "\n```"


def _entries(folder: Path, depth: int) -> Iterator[str]:
    indent = "  " * depth
    kinds = (".py", ".yaml", ".jinja")
    inside = [p for p in sorted(folder.iterdir()) if p.name != "__pycache__" and not p.is_symlink()]
    for path in (p for p in inside if p.is_file() and p.suffix in kinds and p.name != "__init__.py"):
        yield f"{indent}{path.name}\t{gloss(path)}"
    for path in (p for p in inside if p.is_dir()):
        yield f"{indent}{path.name}/\t{gloss(path / '__init__.py')}"
        yield from _entries(path, depth + 1)


def gloss(path: Path) -> str:
    """One line about a file: the first sentence of its docstring, or its first comment."""
    if path.suffix != ".py":
        return first_comment(path)
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(text.partition("\n\n")[0].split()).replace("``", "`")
    return re.split(r"(?<=[a-z`)])\. ", sentence)[0].removesuffix(".")


def first_comment(path: Path) -> str:
    """The first sentence of a file's opening comment, without the command that it gives."""
    if path.suffix == ".jinja":  # a comment in a chat template would be saved with every tokenizer
        return f"a chat template, {path.stem}"
    found = re.match(r"(?:#!.*\n)?((?:#.*\n)+)", path.read_text(encoding="utf-8"))
    assert found, f"{path} begins with no comment"
    comment = " ".join(found[1].replace("#", "").split())
    comment = re.split(r": (?:halfbyte|accelerate|sbatch|kubectl) |: ?$", comment)[0]
    comment = comment.partition(". On machine N")[0]
    return re.split(r"(?<=[a-z)])\. ", comment)[0].rstrip(".:")


def _value(value: Any) -> str:
    value = getattr(value, "value", value)
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"`{text}`"


REGIONS: dict[str, Callable[[], str]] = {
    "commands": command_table,
    "defaults": defaults,
    "floors": floors,
    "formats": formats,
    "initializations": initializations,
    "launch": launch_files,
    "options": options,
    "others": others,
    "recipe": recipe,
    "support": support.markdown,
    "tree": tree,
    "yamls": yamls,
}
