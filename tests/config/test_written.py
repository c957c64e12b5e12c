"""What the YAML file and the command line show by themselves is refused before anything heavy is imported."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from halfbyte import recipe as recipes
from halfbyte import run
from halfbyte.config import collect, read, refuse_early
from halfbyte.config.fields import Field, fields_of
from halfbyte.config.foreign import LAUNCHER_KEYS, RENAMED, reason
from halfbyte.config.others import OTHERS
from halfbyte.config.sources import Node, read_yaml
from halfbyte.errors import UserError
from tests.config.test_help import SHIPPED, classes

# Options of the launcher that are options of every recipe too, and its arguments that are no keys.
SHARED = {"debug", "gradient_accumulation_steps"}
NO_KEYS = {"help", "module", "training_script", "training_script_args", "role", "tee"}

HEAVY = "{'torch', 'transformers', 'trl', 'accelerate', 'numpy', 'datasets', 'halfbyte_recipes', 'rich'}"


CODE = f"""
import contextlib, io, json, sys
from halfbyte import cli, recipe
def load(name): raise SystemExit(0)
recipe.load = load
answers = []
for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try: code = cli.main(["sft", *argv])
        except SystemExit as stop: code = stop.code
    heavy = {HEAVY} & set(sys.modules)
    assert not heavy, (argv, heavy)
    answers.append((code, printed.getvalue()))
print(json.dumps(answers))
"""


def refusals(*lines: Sequence[str]) -> list[str]:
    """The refusals of ``halfbyte sft LINE``, "" where there is none, in a process that imports nothing heavy."""
    command = [sys.executable, "-c", CODE, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for code, printed in answers:
        assert code in (0, 2), printed
        assert (code == 0) == (printed == "halfbyte: loading PyTorch, Transformers and TRL ...\n")
    return [printed if code else "" for code, printed in answers]


def refused(*argv: str) -> str:
    return refusals(argv)[0]


MISTAKES = [
    (
        "learning_rat: 1",
        "learning_rat: unknown option; did you mean learning_rate? (halfbyte sft --help all lists",
    ),
    ("seed: x", "seed: must be a whole number, is 'x'"),
    ("packing: 3", "packing: must be true or false, is '3'"),
    ("learning_rate: 0", "learning_rate: must be greater than 0, is 0"),
    ("lora_r: ~", "lora_r: must be a whole number, is null"),
    ("max_steps: [1]", "max_steps: must be a whole number, is a list of 1"),
    ("optim: paged_adamw", "optim: 'paged_adamw' is not supported; did you mean paged_adamw_8bit or"),
    ("eval_strategy: always", "eval_strategy: 'always' is not supported; write one of no, steps, epoch"),
    ("dtype: bf16", "dtype: 'bf16' is not supported; write one of auto, bfloat16"),
    ("on_oom: wait", "on_oom: 'wait' is not supported; write one of stop, accumulate"),
    ("packing_strategy: x", "packing_strategy: 'x' is not supported; write one of bfd"),
    ("model_init_kwargs: x", "model_init_kwargs: must be a mapping"),
    ("additional_special_tokens: [1, ~]", "additional_special_tokens[1]: must be text, is null"),
    ("datasets: [{pth: b}]", "datasets[0]: unknown key 'pth'; did you mean path?"),
    ("datasets: [{split: b}]", "datasets[0]: path is missing; add it"),
    ("use_peft: false", "use_peft: a 4-bit base trains only through adapters"),
    (
        "load_in_8bit: true\nload_in_4bit: true",
        "load_in_8bit: load_in_4bit is true as well; keep one of the two",
    ),
    ("report_to: ~", "report_to: must not be null"),
    ("output_dir: ${HOME}/x", "output_dir: '${HOME}/x': variables are not expanded in a file"),
    ("num_processes: 2", "num_processes: belongs to the launcher"),
]
INPUTS = "\nmodel_name_or_path: m\ndataset_name: d\n"


def test_what_a_file_shows_by_itself_costs_no_import_and_reads_as_it_would_later(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.yaml" for number in range(len(MISTAKES))]
    for file, (text, _) in zip(files, MISTAKES, strict=True):
        file.write_text(text + INPUTS)
    early = refusals(*(["--config", str(file)] for file in files))
    for file, (text, words), said in zip(files, MISTAKES, early, strict=True):
        assert said.startswith(f"error: {file}:1: {words}"), text
        with pytest.raises(UserError) as late:
            run.read("sft", recipes.load("sft"), ["--config", str(file)])
        assert said == f"error: {late.value}\n"


def test_a_model_and_data_that_are_not_named_cost_no_import(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\n")
    model = "no model: write `model_name_or_path` (a hub id or a directory)\n"
    data = "no data: write `dataset_name` (a hub id or a local path) or `datasets:`\n"
    named = (["--model_name_or_path", "m"], ["--adapter_name_or_path", "a"])
    both, none, *one = refusals(
        ["--config", str(file)], [], *named, ["--dataset_name", "d"], ["--datasets", "{path: d}"],
        [*named[0], "--dataset_name", "d"],
    )  # fmt: skip
    assert both == none == f"error: {model}{data}"
    assert one == [f"error: {data}", f"error: {data}", f"error: {model}", f"error: {model}", ""]


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
    file.write_text("model_name_or_path: m\ndataset_name: d\nlearning_rate: 1\n", encoding="utf-8")
    assert refusals(["--config", str(file)], ["--help"]) == ["", ""]


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


AMBIGUOUS = {"alpha"}  # AlphaPO's for cpo; elsewhere it can only be meant as Unsloth's


@pytest.mark.parametrize("recipe", SHIPPED)
def test_no_option_of_a_recipe_is_foreign(recipe: str) -> None:
    known = fields_of(classes(recipes.load(recipe).config))
    assert set(known) >= SHARED
    assert {key for key in known if reason(key, "halfbyte sft") is not None} <= AMBIGUOUS
    assert not RENAMED.keys() & known.keys()


@pytest.mark.parametrize("key", OTHERS)
def test_the_line_to_write_instead_is_read(key: str) -> None:
    """The example of every option of another system is an option of a shipped recipe, with a value that it takes."""
    known: dict[str, Field] = {}
    for recipe in sorted(SHIPPED, key="dpo".__eq__):  # whose `loss_type` is a list, as those of other systems
        known |= fields_of(classes(recipes.load(recipe).config))
    assert key not in known.keys() - AMBIGUOUS
    if line := OTHERS[key].example():
        entries = read_yaml_text(line)
        for name, node in entries.items():
            known[name].convert(node)
    else:
        assert OTHERS[key].why
    assert len(OTHERS[key].advice("x" * 500)) < 300


def read_yaml_text(text: str) -> dict[str, Node]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return read_yaml(file.name).nodes


CONFIGURATIONS = {
    "axolotl": (
        "base_model: meta-llama/Llama-3.1-8B\nsequence_len: 4096\nmicro_batch_size: 2\nnum_epochs: 3\n"
        "optimizer: adamw_bnb_8bit\nval_set_size: 0.05\nsample_packing: true\nadapter: qlora\n",
        ["model_name_or_path: meta-llama/Llama-3.1-8B", "max_length: 4096", "per_device_train_batch_size: 2",
         "num_train_epochs", "optim: adamw_bnb_8bit", "test_split_size", "packing: true", "use_peft: true"],
    ),
    "LLaMA-Factory": (
        "stage: sft\nfinetuning_type: lora\nlora_target: all\ndataset: identity\ntemplate: llama3\n"
        "cutoff_len: 2048\nmax_samples: 1000\npreprocessing_num_workers: 16\nquantization_bit: 4\n",
        ["halfbyte dpo", "use_peft: true", "lora_target_modules", "dataset_name: identity", "chat_template_path",
         "max_length: 2048", "train[:1000]", "dataset_num_proc: 16", "load_in_4bit: true"],
    ),
    "ms-swift": (
        "model: Qwen/Qwen3-8B\ntrain_type: lora\ntarget_modules: all-linear\nsplit_dataset_ratio: 0.01\n"
        "attn_impl: flash_attn\ntorch_dtype: bfloat16\nsystem: You are helpful.\n",
        ["model_name_or_path: Qwen/Qwen3-8B", "use_peft", "lora_target_modules", "test_split_size",
         "attn_implementation", "dtype", "column `system`"],
    ),
    "alignment-handbook": (
        "dataset_mixer:\n  a: 1.0\ndataset_splits:\n- train\npreprocessing_num_workers: 12\nmax_seq_length: 2048\n"
        "use_flash_attention_2: true\ndataset_mixture:\n  datasets:\n  - id: a\n",
        ["datasets: [{path: data/a.jsonl, fraction: 0.7}", "dataset_train_split", "dataset_num_proc: 12",
         "write max_length", "flash_attention_2"],
    ),
    "Unsloth": (
        "model_name: unsloth/Qwen3-8B\nr: 16\nrandom_state: 3407\nuse_gradient_checkpointing: unsloth\nuse_lora: true\n"
        "bias: none\nloftq_config: null\n",
        ["model_name_or_path: unsloth/Qwen3-8B", "lora_r: 16", "seed: 3407", "gradient_checkpointing: true",
         "use_peft: true", "biases", "init_lora_weights: default"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("system", CONFIGURATIONS)
def test_the_configuration_of_another_system_is_answered_in_one_run(tmp_path: Path, system: str) -> None:
    text, words = CONFIGURATIONS[system]
    file = tmp_path / "theirs.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        refuse_early(collect(["--config", str(file)]), "halfbyte sft", keys=True)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert len(message.splitlines()) == len([line for line in text.splitlines() if line[0] not in " -"])
    assert "did you mean" not in message


def test_the_data_sets_of_another_system_are_answered(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text("datasets:\n  - path: a.jsonl\n    type: alpaca\n", encoding="utf-8")
    with pytest.raises(
        UserError, match="unknown key 'type'; leave it out: rows are recognised by their columns"
    ):
        read(["--config", str(file)], classes(recipes.load("sft").config), prog="halfbyte sft")
