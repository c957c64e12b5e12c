"""The command line: what it prints, what it passes on, and one exit code for each way to end."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte import recipe as recipes
from halfbyte.cli import main
from tests import packages

Fail = Callable[[str], None]


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fail:
    """``failing(code)``: install a recipe ``failing`` whose config class runs ``code`` when it is made.

    It has an option ``batch_size``, which halfbyte's own recipes refuse.
    """

    def install(code: str) -> None:
        lines = [
            "import dataclasses",
            "from halfbyte import Recipe",
            "from trl import SFTConfig, SFTTrainer",
            "@dataclasses.dataclass",
            "class Config(SFTConfig):",
            "    batch_size: int = 1",
            "    def __post_init__(self):",
            f"        {code}",
            "recipe = Recipe(config=Config, trainer=SFTTrainer, summary='fails')",
        ]
        site = packages.write(
            tmp_path / "site", "failing", {"failing": "failing:recipe"}, code="\n".join(lines)
        )
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, "failing", raising=False)

    return install


def places(directory: Path) -> list[str]:
    """A base, which is not read before the failing class is made, and where the run would be written."""
    inputs = ["--model_name_or_path", str(directory), "--dataset_name", str(directory)]
    return [*inputs, "--output_dir", str(directory / "run")]


def test_help_names_the_commands_and_the_exit_codes(capsys) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert "halfbyte RECIPE --config FILE" in text
        assert "accelerate launch" in text
        assert "130 SIGINT" in text


def test_version_is_the_installed_one(capsys) -> None:
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version("halfbyte")


def test_help_of_a_command(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["help", "verify"])
    assert caught.value.code == 0
    assert "usage: halfbyte verify DIR" in capsys.readouterr().out


def test_recipes_are_listed_one_a_line(capsys) -> None:
    assert main(["recipes"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["sft"][1] == "halfbyte"
    assert lines["sft"][-1] == "halfbyte_recipes.sft:recipe"


def test_recipes_are_listed_as_json(capsys) -> None:
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert all(set(entry) == {"name", "package", "version", "object"} for entry in listed)
    assert {"dpo", "kto", "pretrain", "reward", "sft"} <= {entry["name"] for entry in listed}


def test_an_unknown_option_of_recipes_is_a_mistake(capsys) -> None:
    assert main(["recipes", "--jsn"]) == 2
    assert "--jsn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stf"], "did you mean 'sft'"),
        (
            ["grpo"],
            "no recipe or command named 'grpo'; a recipe of another package is installed with that package",
        ),
        (
            ["train", "x.yaml"],
            "recipes: cpo, dpo, kto, orpo, pretrain, reward, sft; `halfbyte --help` lists the commands",
        ),
        (["version"], "version: `halfbyte --version` prints the version"),
        (["-V"], "`halfbyte --version` prints the version"),
        (["it's.yaml"], "the recipe comes first: halfbyte RECIPE --config 'it'\"'\"'s.yaml'"),
        (["sft", "run.yaml"], "'run.yaml': belongs to no option; write --config run.yaml"),
        (["sft", "--seed=3", "a run.yml"], "write --config 'a run.yml'"),
        (["plan"], "halfbyte plan: the following arguments are required: RECIPE"),
        (["plan", "sfd", "--json"], "no recipe or command named 'sfd'; did you mean 'sft'?"),
        (["--config", "x.yaml"], "the recipe comes first"),
        (["merge"], "halfbyte merge: the following arguments are required: ADAPTER, --output_dir"),
        (["cache", "clear"], "invalid choice: 'clear' (choose from 'ls', 'rm')"),
        (["sft", "--config", "no-such.yaml"], "no-such.yaml"),
    ],
)
def test_a_mistake_ends_with_2_and_is_said_on_standard_error(capsys, arguments: list[str], said: str) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert said in printed.err
    assert "Traceback" not in printed.err


def test_every_command_answers(capsys) -> None:
    for name in sorted(recipes.COMMANDS - {"demo", "doctor", "recipes"}):
        assert main([name]) == 2
        assert name in capsys.readouterr().err


def test_a_package_that_takes_a_command_name_breaks_the_listing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(packages.write(tmp_path, "grabber", {"merge": "grabber:recipe"})))
    assert main(["recipes"]) == 2
    assert "grabber 1.0" in capsys.readouterr().err


def test_an_interrupt_ends_with_130(failing: Fail, capsys, tmp_path: Path) -> None:
    failing("raise KeyboardInterrupt")
    assert main(["failing", *places(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not (tmp_path / "run").exists()


def test_an_error_nobody_foresaw_ends_with_1(failing: Fail, capsys, tmp_path: Path) -> None:
    failing("raise ZeroDivisionError('nobody foresaw this')")
    assert main(["failing", *places(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "error: ZeroDivisionError: nobody foresaw this\n(--debug shows the traceback)" in error
    assert "Traceback" not in error


def test_a_third_party_recipe_has_options_that_ours_refuse(failing: Fail, capsys, tmp_path: Path) -> None:
    failing("raise ZeroDivisionError(f'batch_size={self.batch_size}')")
    assert main(["failing", "--batch_size", "3", *places(tmp_path)]) == 1
    assert "batch_size=3" in capsys.readouterr().err
    assert main(["sft", "--batch_size", "3", *places(tmp_path)]) == 2
    assert "--batch_size: unknown option; write per_device_train_batch_size" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["first", "after the recipe", "last"])
def test_debug_shows_the_traceback_wherever_it_stands(capsys, place: str) -> None:
    options = ["--learning_rat", "1"]
    arguments = {
        "first": ["--debug", "sft", *options],
        "after the recipe": ["sft", "--debug", *options],
        "last": ["sft", *options, "--debug"],
    }[place]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("error: --learning_rat: unknown option")
    assert error.count("unknown option") == 1


def test_debug_says_the_whole_of_a_message_once(failing: Fail, capsys, tmp_path: Path) -> None:
    failing("raise ZeroDivisionError('\\n'.join(f'line {n}' for n in range(20)))")
    assert main(["failing", *places(tmp_path), "--debug"]) == 1
    lines = capsys.readouterr().err.splitlines()
    said = ["error: ZeroDivisionError: line 0", *(f"line {n}" for n in range(1, 20))]
    assert lines[-20:] == said
    assert lines[0] == "Traceback (most recent call last):"
    assert not set(said) & set(lines[:-20])
    assert not any("--debug shows" in line or line.startswith("ZeroDivisionError") for line in lines)


def test_debug_with_a_value_is_trl_s_own_option(failing: Fail, capsys, tmp_path: Path) -> None:
    failing("raise ZeroDivisionError(f'debug={self.debug}')")
    options = ["--debug", "underflow_overflow", *places(tmp_path)]
    assert main(["failing", *options]) == 1
    error = capsys.readouterr().err
    assert "debug=underflow_overflow" in error
    assert "Traceback" not in error
    assert main(["failing", *options, "--debug"]) == 1
    error = capsys.readouterr().err
    assert "debug=underflow_overflow" in error
    assert "Traceback" in error


@pytest.mark.parametrize(
    "command", [["-m", "halfbyte"], ["-c", "import sys; from halfbyte.cli import main; sys.exit(main())"]]
)
def test_the_module_and_the_console_script_exit_with_the_code(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "stf"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean 'sft'" in done.stderr


def test_a_kernel_package_that_is_not_used_is_not_advertised(caplog: pytest.LogCaptureFixture) -> None:
    """Exactly that line of bitsandbytes' is dropped; its others are left alone."""
    import inspect
    import logging

    from bitsandbytes.backends.cpu import ops

    from halfbyte.terminal import quiet

    quiet.advertisements()
    line = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
    assert line in inspect.getsource(ops)
    with caplog.at_level(logging.WARNING):
        ops.logger.warning(line, "no module")
        ops.logger.warning("another of its lines")
    assert [record.message for record in caplog.records] == ["another of its lines"]


def test_a_report_of_a_line_for_each_weight_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from halfbyte.terminal import quiet

    quiet.long_reports()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)  # it may not propagate
    try:
        logger.warning("report:\n%s", "\n".join(f"x{n} | UNEXPECTED" for n in range(100_000)))
        logger.warning("a short one")
    finally:
        logger.removeHandler(caplog.handler)
    report, short = dict.fromkeys(record.message for record in caplog.records)
    lines = report.splitlines()
    assert (len(lines), lines[:2], lines[-1]) == (10, ["report:", "x0 | UNEXPECTED"], "... 99,992 lines more")
    assert short == "a short one"


def test_a_panic_of_a_library_in_rust_is_an_error_in_one_line(
    capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `tokenizers` panics where its regular expression takes too long; what is raised then is no Exception."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("^(([a-z ])+.)+Z([A-Z])+$"), "isolated")
    monkeypatch.setattr("halfbyte.commands.recipes.main", lambda _: tokenizer.encode("a quick fox " * 9))
    assert main(["recipes"]) == 1
    assert "error: PanicException: " in capsys.readouterr().err


def test_that_it_loads_is_said_before_anything_heavy_is_imported() -> None:
    code = (
        "import os, sys\n"
        "class Heavy:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'torch', 'numpy'}:\n"
        "            os._exit(7)\n"
        "sys.meta_path.insert(0, Heavy)\n"
        "from halfbyte.cli import main\n"
        "main(['sft', '--model_name_or_path', 'base', '--dataset_name', 'rows.jsonl', '--output_dir', 'out'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "halfbyte: loading PyTorch, Transformers and TRL ...\n")


def test_an_empty_local_rank_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("LOCAL_RANK", "")
    assert main(["stf"]) == 2
    assert capsys.readouterr().err.startswith("error: no recipe or command named 'stf'")
