"""The demo from end to end, small, and how it fails."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte import demo
from halfbyte.cli import main
from halfbyte.commands import demo as command
from halfbyte.demo import base, corpus, stages, summary
from halfbyte.errors import UserError
from halfbyte.export import MERGE_RECORD, compared

SMALL = stages.Size(base_steps=12, sft_steps=6, dpo_steps=4, held_out_rows=32)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_small_demo_trains_three_times_on_two_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "out"
    assert demo.run(directory, SMALL) == 0
    runs = {name: json.loads((directory / name / "run.json").read_text()) for name in summary.RUNS}
    for run, steps in zip(runs.values(), (12, 6, 4), strict=True):
        assert run["status"] == "completed"
        assert run["steps"] == steps
        assert run["strategy"]["world_size"] == 2
        assert len(run["peak_memory_bytes"]) == 2
    losses = {
        name: [run["metrics"][part]["eval_loss"] for part in ("before", "eval")] for name, run in runs.items()
    }
    assert losses["base"][1] < losses["base"][0]
    # Six steps from a base of twelve: what they come to depends on the machine, that they train does not.
    assert losses["sft"][1] != losses["sft"][0]
    assert losses["dpo"][0] == pytest.approx(0.693147, abs=1e-5)
    assert runs["sft"]["base"]["bytes_4bit"] < runs["sft"]["base"]["bytes_16bit"]
    assert runs["sft"]["base"]["four_bit_share"] == 1.0
    for name in ("sft", "dpo"):
        assert (directory / name / "adapter_model.safetensors").is_file()
        assert list((directory / name / "plots").glob("*.png"))
    printed = capsys.readouterr().out
    for figure in ("SFT: loss", "DPO: preference accuracy", "all tied", "NF4", "peak memory", "plots"):
        assert figure in printed
    for name, recipe in (("base", "pretrain"), ("sft", "sft"), ("dpo", "dpo")):
        assert f"-m halfbyte {recipe} --config {directory / name}.yaml" in printed
    (entry,) = base.cache_directory().iterdir()
    assert base.restore(entry, tmp_path / "again")
    for name in ("sft", "dpo"):
        assert_merge_is_the_best(directory / name, tmp_path / f"merged-{name}")
    assert_merges_complete_as_trained(directory, tmp_path)


def assert_merge_is_the_best(run: Path, output: Path) -> None:
    """Merged, a run is no worse than any alternative on the rows that it evaluated on, but for a standard error."""
    assert main(["merge", str(run), "--output_dir", str(output)]) == 0
    measured = json.loads((output / MERGE_RECORD).read_text())["measured"]
    merged, others = measured[compared.MERGED], (measured[compared.REQUANTIZED], measured[compared.ORIGINAL])
    assert merged["nll"] <= min(other["nll"] for other in others) + merged["nll_error"]
    assert merged["error"] < min(other["error"] for other in others)
    assert merged["kl"] < min(other["kl"] for other in others)
    assert merged["top1"] >= max(other["top1"] for other in others)


def assert_merges_complete_as_trained(directory: Path, outputs: Path) -> None:
    """Merged in float32, the runs write in plain transformers what they write on their 4-bit base."""
    trained = summary.samples(directory)
    for name in ("sft", "dpo"):
        output = outputs / f"exact-{name}"
        words = ["--output_dir", str(output), "--dtype", "float32", "--measure", "none"]
        assert main(["merge", str(directory / name), *words]) == 0
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(output)
        for signature, answers in trained:
            prompt = [{"role": "user", "content": signature}]
            assert summary.completion(model, tokenizer, prompt) == answers[name.upper()]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, library: corpus.Corpus) -> list[str]:
    """Every stage is started, says one line and ends with status 7."""
    started: list[str] = []

    def follow(command: list[str], log: Path, name: str, console: Any) -> int:
        started.append(name)
        log.write_text("first\n" * 100 + "the cause\n")
        return 7

    monkeypatch.setattr(stages, "_follow", follow)
    monkeypatch.setattr(corpus, "collect", lambda: library)
    return started


def test_failure_shows_the_end_of_the_log_and_passes_the_status_on(
    failing: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.run(tmp_path / "out", SMALL) == 7
    assert failing == ["base"]
    said = capsys.readouterr().err
    assert "the cause" in said
    assert str(tmp_path / "out" / "base.log") in said
    assert said.count("first") < 50
    assert not base.cache_directory().exists()


def test_earlier_demo_is_moved_aside(failing: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "out"
    (directory / "sft").mkdir(parents=True)
    (directory / "sft" / "run.json").write_text("kept")
    demo.run(directory, SMALL)
    assert (tmp_path / "out.1" / "sft" / "run.json").read_text() == "kept"
    assert not (directory / "sft").exists()
    written = {path.name for path in directory.iterdir()}
    assert {"base.yaml", "base.log", "data"} <= written
    demo.run(directory, SMALL)  # with all that a demo has written
    assert {path.name for path in (tmp_path / "out.2").iterdir()} == written


def test_nothing_else_is_moved_aside_or_written(
    failing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "empty" / "inner").mkdir(parents=True)
    (home / "demo" / "sft").mkdir(parents=True)
    (home / "mine").write_text("kept")
    (home / "link").symlink_to(home / "demo")
    (home / "loop").symlink_to(home / "loop")
    monkeypatch.chdir(home / "empty" / "inner")
    before = sorted(tmp_path.rglob("*"))
    for place, words in {
        home: "holds demo, which is not a demo's",
        Path(): "is a link or the working directory",
        Path("."): "is a link or the working directory",
        Path(".."): "holds inner, which is not a demo's",
        home / "link": "is a link or the working directory",
        home / "loop": "is a link or the working directory",
        home / "mine": "is a file; name a directory",
        home / "mine" / "x": "cannot write",
        home / ("x" * 300): "File name too long",
        Path("/proc/x/y"): "cannot write /proc/x/y: No such file",
        Path("a\0b"): "null",
    }.items():
        with pytest.raises(UserError, match=rf"^--output_dir: .*{words}") as caught:
            demo.run(place, SMALL)
        assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert failing == []


@pytest.mark.parametrize("argv", [["--output", "x"], ["--steps", "3"], ["stray"]])
def test_unknown_options_are_refused(argv: list[str]) -> None:
    with pytest.raises(UserError, match="--output_dir DIR"):
        command.main(argv)


def test_a_file_is_no_output_dir(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        demo.run(tmp_path / "file", SMALL)


def test_not_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without `accelerate launch`"):
        command.main([])
