"""`halfbyte merge` on runs: what it writes, what it measures, what it refuses, and that nothing half done is left."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from halfbyte.cli import main
from halfbyte.export import compared
from tests import launch, plain_trl, tiny
from tests.checkpoint.runs import options

ModelDir = Callable[..., Path]
GIVEN = {"eval_strategy": "steps", "eval_steps": "6", "save_strategy": "no", "learning_rate": "2e-2"}
RUNS = {"sft": tiny.conversations, "dpo": tiny.preferences, "reward": tiny.preferences}


@pytest.fixture(scope="module")
def runs(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft, dpo (which continues sft) and reward, six steps each, with rows that they evaluated on."""
    root = tmp_path_factory.mktemp("runs")
    for recipe, rows in RUNS.items():
        data = tiny.write_rows(root / f"rows-{recipe}", rows(20))
        more = ["--adapter_name_or_path", str(root / "sft")] if recipe == "dpo" else []
        assert main([recipe, *options(model_dir("llama"), data, root / recipe, **GIVEN), *more]) == 0
    return root


def told(output: Path) -> dict:
    return json.loads((output / "merge.json").read_text())


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_a_run_is_merged_and_measured(
    runs: Path, tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    assert main(["merge", str(runs / recipe), "--output_dir", str(output), "--dtype", "float32"]) == 0
    printed, found = capsys.readouterr().out, told(output)
    measured = found["measured"]
    assert list(measured) == [compared.TRAINED, compared.MERGED, compared.REQUANTIZED, compared.ORIGINAL]
    assert measured[compared.MERGED]["error"] < 1e-4
    assert measured[compared.MERGED]["kl"] < 1e-9
    assert measured[compared.MERGED]["top1"] == 1.0
    assert measured[compared.MERGED]["nll"] == pytest.approx(measured[compared.TRAINED]["nll"], abs=1e-6)
    for worse in (compared.REQUANTIZED, compared.ORIGINAL):
        assert measured[worse]["error"] > 10 * measured[compared.MERGED]["error"]
    assert ("accuracy" in measured[compared.MERGED]) == (recipe == "dpo")
    assert "split test" in found["measured_on"]
    assert f"merged: {output}" in printed
    # The figure is that of the run, and the model that of the adapter.
    if recipe == "sft":
        evaluated = json.loads((runs / "sft" / "run.json").read_text())["metrics"]["eval"]["eval_loss"]
        assert measured[compared.TRAINED]["nll"] == pytest.approx(evaluated, abs=1e-4)
    base = json.loads((runs / "sft" / "run.json").read_text())["base"]["name"]
    trained = PeftModel.from_pretrained(plain_trl.not_repacked(plain_trl.base(Path(base))), runs / recipe)
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(runs / recipe).chat_template
    prompt = tokenizer("the quick brown", return_tensors="pt")
    with torch.no_grad():
        one, other = trained.eval()(**prompt).logits, merged(**prompt).logits
        said = [
            model.generate(**prompt, do_sample=False, max_new_tokens=12).tolist()
            for model in (trained, merged)
        ]
    assert (one - other).norm() < 1e-5 * other.norm()
    assert said[0] == said[1]
    assert {path.name for path in output.iterdir()} >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "merge.json",
    }
    assert set(found["files"]) == {path.name for path in output.iterdir()} - {"merge.json"}
    assert not [path for path in tmp_path.iterdir() if path != output]
    assert str(runs) not in (output / "README.md").read_text()
    assert main(["verify", str(output)]) == 0
    assert capsys.readouterr().out == "merged model: ok\n"
    weights = output / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert main(["verify", str(output)]) == 1
    assert "model.safetensors" in capsys.readouterr().out


def test_a_reward_model_keeps_its_head(runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    assert main(["merge", str(runs / "reward"), "--output_dir", str(output), "--dtype", "float32"]) == 0
    merged, info = AutoModelForSequenceClassification.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert merged.config.pad_token_id == AutoTokenizer.from_pretrained(output).pad_token_id
    head = load_file(runs / "reward" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(merged.score.weight, head)
    found = told(output)["measured"]
    evaluated = json.loads((runs / "reward" / "run.json").read_text())["metrics"]["eval"]
    assert found[compared.MERGED]["accuracy"] == pytest.approx(evaluated["eval_accuracy"])
    assert found[compared.MERGED]["nll"] == pytest.approx(evaluated["eval_loss"], abs=1e-4)


def test_other_rows_and_an_adapter_without_a_run(runs: Path, tmp_path: Path, capsys) -> None:
    adapter = shutil.copytree(runs / "sft", tmp_path / "adapter")
    (adapter / "run.json").unlink()
    words = ["merge", str(adapter), "--output_dir", str(tmp_path / "a"), "--dtype", "float32"]
    assert main(words) == 0
    assert "no held-out rows: a fixed text" in capsys.readouterr().err
    assert told(tmp_path / "a")["measured_on"] == "a fixed text"
    words[3] = str(tmp_path / "b")
    data = str(runs / "rows-sft")
    assert main([*words, "--data", data]) == 2
    assert "--recipe: nothing says which recipe reads these rows" in capsys.readouterr().err
    assert main([*words, "--data", data, "--recipe", "sft"]) == 0
    assert told(tmp_path / "b")["measured_on"] == "rows-sft, split test"


def test_a_merge_beyond_its_bound_is_kept_by_force_alone(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", str(runs / "sft"), "--output_dir", str(tmp_path / "merged"), "--into", "original"]
    words += ["--dtype", "float32"]
    assert main(words) == 1
    printed = capsys.readouterr().err
    assert "of the adapter's effect, more than 0.10%" in printed
    assert not list(tmp_path.iterdir())
    assert main([*words, "--force"]) == 0
    assert told(tmp_path / "merged")["into"] == "original"


def test_an_adapter_is_not_stacked_on_its_ancestor(runs: Path, tmp_path: Path, capsys) -> None:
    words = ["merge", str(runs / "sft"), str(runs / "dpo"), "--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert f"{runs / 'dpo'} was trained from {runs / 'sft'} and contains it" in capsys.readouterr().err


REFUSED = {
    "no adapter": (["BASE"], "is not an adapter"),
    "weights": (["SFT", "--weights", "1", "2"], "--weights: 2 weights for 1 adapters"),
    "another base": (["SFT", "--model_name_or_path", "OTHER"], "was trained on the base"),
    "a size": (["SFT", "--max_shard_size", "0GB"], "--max_shard_size"),
    "unknown": (["SFT", "--outputdir", "x"], "--output_dir"),
}


@pytest.mark.parametrize("cell", REFUSED)
def test_what_is_refused(
    model_dir: ModelDir, runs: Path, tmp_path: Path, cell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, reason = REFUSED[cell]
    places = {
        "BASE": str(model_dir("llama")),
        "SFT": str(runs / "sft"),
        "OTHER": str(model_dir("llama", seed=7)),
    }
    given = [places.get(word, word) for word in words]
    assert main(["merge", *given, "--output_dir", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_adapter_leaves_nothing(runs: Path, tmp_path: Path, capsys) -> None:
    adapter = shutil.copytree(runs / "sft", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.replace("q_proj", "p_proj"): each for name, each in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    assert main(["merge", str(adapter), "--output_dir", str(tmp_path / "out")]) == 2
    assert "p_proj" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("kind", "reason"), [("cut", "is damaged"), ("none", "holds no adapter weights"), ("bin", "own format")]
)
def test_weights_that_cannot_be_read(runs: Path, tmp_path: Path, kind: str, reason: str, capsys) -> None:
    adapter = shutil.copytree(runs / "sft", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        file.unlink()
    if kind == "bin":
        (adapter / "adapter_model.bin").write_bytes(b"x")
    assert main(["merge", str(adapter), "--output_dir", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_too_little_space_is_said_before(runs: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["merge", str(runs / "sft"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "has 0 MiB free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from halfbyte.cli import main
from halfbyte.export.shards import Shards
wanted, write = int(sys.argv[1]), Shards._write
def killed(self):
    write(self)
    if len(self._files) == wanted:
        os.kill(os.getpid(), signal.SIGKILL)
Shards._write = killed
finish = Shards.finish
def finished(self):
    found = finish(self)
    if wanted == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
Shards.finish = finished
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    "at", [pytest.param(0, marks=pytest.mark.faults), 1, pytest.param(3, marks=pytest.mark.faults)]
)
def test_a_kill_leaves_nothing_under_the_name(runs: Path, tmp_path: Path, at: int) -> None:
    """After a file, or after the last; a second start begins again and removes what was left."""
    output = tmp_path / "merged"
    words = [
        "merge",
        str(runs / "sft"),
        "--output_dir",
        str(output),
        "--max_shard_size",
        "60KB",
        "--measure",
        "none",
    ]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(at), *words],
        env=launch.environment(),
        cwd=launch.ROOT,
        capture_output=True,
        timeout=launch.TIMEOUT,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not output.exists()
    assert list(tmp_path.iterdir()), "what was half written has another name"
    assert main(words) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert len(list(output.glob("model-*.safetensors"))) > 3
    AutoModelForCausalLM.from_pretrained(output)
