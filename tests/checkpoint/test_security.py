"""What others wrote executes nothing, and what is secret is written nowhere."""

import ast
import builtins
import contextlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfbyte import recipe
from halfbyte.checkpoint import manifest
from halfbyte.cli import main
from tests import launch, packages, tiny
from tests.checkpoint.runs import Finished, options

PLUGIN = launch.ROOT / "plugin" / "halfbyte"


class Malicious:
    """A pickle of it makes a directory wherever it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return os.makedirs, (str(self.place),)


@pytest.fixture
def hostile(finished: Finished, tmp_path: Path) -> Callable[..., int]:
    """``hostile(change)``: resume from a checkpoint that ``change`` was made to and a valid manifest put on."""

    def resume(change: Callable[[Path], None]) -> int:
        output = tmp_path / "run"
        checkpoint = output / "checkpoint-4"
        shutil.copytree(finished.output / "checkpoint-4", checkpoint)
        shutil.copyfile(finished.output / "run.json", output / "run.json")
        was = manifest.read(checkpoint)
        change(checkpoint)
        (checkpoint / manifest.NAME).unlink()
        with contextlib.suppress(OSError):  # a link: it stays without one
            manifest.write(checkpoint, was)
        return main(["sft", *finished.options(output), "--resume_from_checkpoint", "auto"])

    return resume


PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors")


@pytest.mark.parametrize(
    "name", [PICKLES[0], *(pytest.param(name, marks=pytest.mark.faults) for name in PICKLES[1:])]
)
def test_a_malicious_pickle_is_not_executed(hostile, tmp_path: Path, name: str, capsys) -> None:
    executed = tmp_path / "executed"

    def change(checkpoint: Path) -> None:
        assert (checkpoint / name).is_file()
        if name.endswith(".safetensors"):
            (checkpoint / name).write_bytes(pickle.dumps(Malicious(executed)))
        else:
            torch.save(Malicious(executed), checkpoint / name)

    assert hostile(change) in (1, 2)
    assert not executed.exists()
    assert "error: " in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize("name", ["training_args.bin", "adapter_model.bin", "trainer_state.pt"])
def test_a_pickle_beside_what_is_needed_is_not_executed(hostile, tmp_path: Path, name: str) -> None:
    executed = tmp_path / "executed"

    def change(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(pickle.dumps(Malicious(executed)))
        if name == "adapter_model.bin":
            (checkpoint / "adapter_model.safetensors").unlink()

    hostile(change)
    assert not executed.exists()


@pytest.mark.faults
def test_a_huge_declared_shape_is_an_error(hostile, capsys) -> None:
    def change(checkpoint: Path) -> None:
        header = {"weight": {"dtype": "F32", "shape": [1 << 20, 1 << 30], "data_offsets": [0, 1 << 52]}}
        text = json.dumps(header).encode()
        (checkpoint / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)

    assert hostile(change) in (1, 2)
    assert "error: " in capsys.readouterr().err


def test_a_link_out_of_a_checkpoint_is_refused(hostile, tmp_path: Path, capsys) -> None:
    def change(checkpoint: Path) -> None:
        (tmp_path / "outside").write_bytes((checkpoint / "optimizer.pt").read_bytes())
        (checkpoint / "optimizer.pt").unlink()
        (checkpoint / "optimizer.pt").symlink_to(tmp_path / "outside")

    assert hostile(change) == 2
    assert "no checkpoint in" in capsys.readouterr().err


def test_nothing_of_ours_unpickles() -> None:
    for path in PLUGIN.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & names, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system", "yaml.unsafe_load", "joblib.load"), path
                if called == "torch.load":
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert given.get("weights_only") == "True", f"{path}:{node.lineno}"


def test_code_in_a_model_directory_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    base = tmp_path / "base"
    tiny.save_model(base)
    config = json.loads((base / "config.json").read_text())
    config["model_type"] = "theirs"
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["theirs.Tokenizer", None]}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (base / "theirs.py").write_text(f"import os\nos.makedirs({str(tmp_path / 'executed')!r})\n")
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda text="": asked.append(text) or "y")
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(12))
    assert main(["sft", *options(base, rows, tmp_path / "run")]) in (1, 2)
    assert "error: " in capsys.readouterr().err
    assert asked == []
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "run").exists()


def test_only_the_recipe_that_is_typed_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import os\nos.makedirs({str(tmp_path / 'executed')!r})\n" + packages.RECIPE
    site = packages.write(tmp_path / "site", "unasked", {"theirs": "unasked:recipe"}, code=code)
    monkeypatch.syspath_prepend(str(site))
    assert "theirs" in {entry.name for entry in recipe.entries()}
    recipe.load("sft")
    assert not (tmp_path / "executed").exists()
    recipe.load("theirs")
    assert (tmp_path / "executed").exists()


def test_secrets_are_in_no_file_and_no_line(tmp_path: Path, model_dir) -> None:
    canaries = {place: f"canary-of-the-{place}" for place in ("file", "nested", "argv")}
    environment = {"HF_TOKEN": "hf_" + "canary" * 6, "WANDB_API_KEY": "c0ffee" * 6 + "cafe"}
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(12))
    output = tmp_path / "run"
    config = tmp_path / "run.yaml"
    config.write_text(
        f"hub_token: {canaries['file']}\n"
        f"model_init_kwargs:\n  token: {canaries['nested']}\n"
        "report_to: wandb\nmax_steps: 2\nsave_steps: 1\ndtype: float32\n"
        f"model_name_or_path: {model_dir('llama')}\ndataset_name: {rows}\noutput_dir: {output}\n"
    )
    argv = ["sft", "--config", str(config), "--hub_token", canaries["argv"]]
    done = launch.halfbyte(*argv, WANDB_MODE="offline", WANDB_SILENT="true", **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [Path(at) / name for at, _, names in os.walk(output) for name in names]
    assert any(file.suffix == ".wandb" for file in files), "W&B wrote"
    assert {"run.json", "README.md", "metrics.jsonl"} <= {file.name for file in files}
    for secret in (*canaries.values(), *environment.values()):
        assert secret not in done.stdout + done.stderr
        assert [file for file in files if secret.encode() in file.read_bytes()] == []
