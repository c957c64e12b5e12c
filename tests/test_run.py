"""Whole runs through the command line: what they write, and what they refuse without writing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.cli import main
from tests import tiny

ModelDir = Callable[..., Path]
RECIPE_ROWS = {"sft": tiny.conversations, "dpo": tiny.preferences, "pretrain": tiny.texts}


DEFAULTS = {
    "--max_steps": "2",
    "--logging_steps": "1",
    "--per_device_train_batch_size": "2",
    "--report_to": "none",
    "--save_strategy": "no",
    "--dtype": "float32",
}


def run(recipe: str, output: Path, *options: str) -> int:
    defaults = [word for key, value in DEFAULTS.items() if key not in options for word in (key, value)]
    return main([recipe, "--output_dir", str(output), *defaults, *options])


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[str], str]:
    return lambda recipe: tiny.write_rows(tmp_path / "rows", RECIPE_ROWS[recipe](20))


def record(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())


@pytest.mark.parametrize("arch", ["llama", "opt", "qwen3", "gemma"])
@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_every_architecture_trains(model_dir: ModelDir, tmp_path: Path, rows, arch: str, recipe: str) -> None:
    output = tmp_path / "run"
    options = ("--model_name_or_path", str(model_dir(arch)), "--dataset_name", rows(recipe))
    assert run(recipe, output, *options, "--learning_rate", "1e-2") == 0
    assert set(record(output)["memory"]) == {"predicted", "measured", "difference"}
    weights = load_file(output / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    silent = [name for name, w in weights.items() if "lora_B" in name and not w.abs().max() > 0]
    assert not silent, f"these adapters did not train: {silent}"
    told = record(output)
    assert told["status"] == "completed"
    assert told["steps"] == 2
    assert told["base"]["four_bit_share"] == 1.0
    assert told["config"]["load_in_4bit"] is True
    held = told["strategy"].pop("base_bytes_per_rank")
    assert told["strategy"] == {"name": "single", "world_size": 1, "devices": ["cpu"]}
    assert held == [told["base"]["bytes_4bit"]]
    losses = [json.loads(line).get("loss") for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len([loss for loss in losses if loss is not None]) == 2
    assert (output / "plots" / "loss.png").stat().st_size > 1000
    assert (output / "README.md").is_file()


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_embeddings_or_a_head_are_trained_beside_a_16_bit_base(
    model_dir: ModelDir, tmp_path: Path, rows, module: str
) -> None:
    """Trained copies are float32: the trial of the loss casts as a step does."""
    output = tmp_path / "run"
    options = ("--model_name_or_path", str(model_dir("llama")), "--dataset_name", rows("sft"))
    assert run("sft", output, *options, "--dtype", "bfloat16", "--lora_modules_to_save", module) == 0
    saved = [w for name, w in load_file(output / "adapter_model.safetensors").items() if module in name]
    base = [w for name, w in load_file(model_dir("llama") / "model.safetensors").items() if module in name]
    assert saved[0].dtype == torch.float32
    assert not torch.equal(saved[0].bfloat16(), base[0].bfloat16())


def test_sft_then_dpo_from_its_adapter(model_dir: ModelDir, tmp_path: Path, capsys) -> None:
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    chat = tiny.write_rows(tmp_path / "chat", tiny.conversations(20))
    pairs = tiny.write_rows(tmp_path / "pairs", tiny.preferences(20))
    evaluating = ("--eval_strategy", "steps", "--eval_steps", "1", "--eval_on_start")
    assert (
        run("sft", sft, "--model_name_or_path", str(model_dir("llama")), "--dataset_name", chat, *evaluating)
        == 0
    )
    assert "next: halfbyte dpo --adapter_name_or_path" in capsys.readouterr().out
    told = record(sft)["metrics"]
    assert told["before"]["eval_loss"] > 0
    assert told["eval"]["step"] == 2
    start = ("--adapter_name_or_path", str(sft), "--dataset_name", pairs)
    assert run("dpo", dpo, *start, "--lora_r", "64") == 2
    assert "--lora_r: 64 is not what the adapter" in capsys.readouterr().err
    assert run("dpo", dpo, *start, *evaluating) == 0
    assert record(dpo)["config"]["lora_target_modules"] == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    assert record(dpo)["metrics"]["before"]["eval_loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert record(dpo)["base"]["sha"] == record(sft)["base"]["sha"]
    # The frozen reference is not part of the result, which PEFT loads on the base by itself.
    assert not (dpo / "ref").exists()
    assert json.loads((dpo / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        model_dir("llama")
    )
    assert (
        load_file(dpo / "adapter_model.safetensors").keys()
        == load_file(sft / "adapter_model.safetensors").keys()
    )


def test_full_parameter_pretraining_writes_a_model(model_dir: ModelDir, tmp_path: Path, rows) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "base"
    options = ("--model_name_or_path", str(model_dir("llama")), "--dataset_name", rows("pretrain"))
    full = ("--load_in_4bit", "false", "--use_peft", "false", "--max_length", "32", "--learning_rate", "1e-2")
    assert run("pretrain", output, *options, *full) == 0
    assert not (output / "adapter_config.json").exists()
    before, after = (
        AutoModelForCausalLM.from_pretrained(d).state_dict() for d in (model_dir("llama"), output)
    )
    assert all(not torch.equal(before[name], after[name]) for name in before if "layernorm" not in name)
    assert len(AutoTokenizer.from_pretrained(output)) == tiny.VOCABULARY


def test_full_parameter_sft_names_what_can_start_from_it(
    model_dir: ModelDir, tmp_path: Path, rows, capsys
) -> None:
    options = ("--model_name_or_path", str(model_dir("llama")), "--dataset_name", rows("sft"))
    assert run("sft", tmp_path / "run", *options, "--load_in_4bit", "false", "--use_peft", "false") == 0
    assert f"next: halfbyte dpo --model_name_or_path {tmp_path / 'run'} " in capsys.readouterr().out


def test_the_figures_are_those_of_the_weights_that_are_kept(
    model_dir: ModelDir, tmp_path: Path, rows, capsys
) -> None:
    output = tmp_path / "run"
    options = ("--model_name_or_path", str(model_dir("llama")), "--dataset_name", rows("sft"))
    # The best is the highest loss: of the first evaluation, since the second is after more training.
    best = (
        "--load_best_model_at_end",
        "true",
        "--metric_for_best_model",
        "loss",
        "--greater_is_better",
        "true",
    )
    every = ("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2")
    assert run("sft", output, *options, *best, *every, "--max_steps", "4", "--learning_rate", "1e-2") == 0
    told = record(output)
    assert told["best_checkpoint"] == "checkpoint-2"
    evaluated = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval_loss"] for row in evaluated if "eval_loss" in row}
    assert losses[2] > losses[4]
    assert (told["metrics"]["eval"]["step"], told["metrics"]["eval"]["eval_loss"]) == (2, losses[2])
    kept, saved = (load_file(d / "adapter_model.safetensors") for d in (output, output / "checkpoint-2"))
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    assert "those of checkpoint-2, the best" in capsys.readouterr().out


def test_a_login_that_is_no_good_stops_no_run_that_did_not_ask_for_it(
    model_dir: ModelDir, tmp_path: Path, rows, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    wandb.teardown()
    options = ["--model_name_or_path", str(model_dir("llama")), "--dataset_name", rows("sft")]
    defaults = [word for key, value in DEFAULTS.items() if key != "--report_to" for word in (key, value)]
    assert main(["sft", "--output_dir", str(tmp_path / "run"), *defaults, *options]) == 0
    said = capsys.readouterr().out
    assert "invalid W&B credentials" in said
    assert "short" not in said
    wandb.teardown()


def test_a_mistake_that_is_found_late_has_its_line_too(
    model_dir: ModelDir, tmp_path: Path, rows, capsys
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {model_dir('llama')}\ndataset_name: {rows('sft')}\ndataset_train_split: trian\n"
    )
    assert run("sft", tmp_path / "run", "--config", str(config)) == 2
    assert f"error: {config}:3: dataset_train_split: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_resumed_from(model_dir: ModelDir, tmp_path: Path, rows) -> None:
    options = (
        "--model_name_or_path",
        str(model_dir("llama")),
        "--dataset_name",
        rows("sft"),
        "--save_strategy",
        "steps",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("sft", whole, *options, "--save_steps", "2", "--max_steps", "4", "--lora_dropout", "0.1") == 0
    assert (whole / "checkpoint-2").is_dir()
    import shutil

    parts.mkdir()
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    resumed = (*options, "--max_steps", "4", "--lora_dropout", "0.1", "--resume_from_checkpoint", "auto")
    assert run("sft", parts, *resumed) == 0
    a, b = (load_file(d / "adapter_model.safetensors") for d in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_rows_that_train_nothing_leave_no_directory(model_dir: ModelDir, tmp_path: Path, capsys) -> None:
    """Found only when the trainer is built, which makes the directory: it is taken away again."""
    rows = tiny.write_rows(
        tmp_path / "long", [{"prompt": tiny.text(n) * 8, "completion": tiny.text(n)} for n in range(20)]
    )
    options = ("--model_name_or_path", str(model_dir("llama")), "--dataset_name", rows, "--max_length", "8")
    assert run("sft", tmp_path / "run", *options) == 2
    assert "max_length" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


WHOLE = ["--model_name_or_path", "{model}", "--dataset_name", "{rows}"]
MISTAKES = {
    "no model": (["--dataset_name", "{rows}"], "no model"),
    "no such model": (["--model_name_or_path", "no/such", "--dataset_name", "{rows}"], "no/such"),
    "no data": (["--model_name_or_path", "{model}"], "dataset_name"),
    "no such data": (
        ["--model_name_or_path", "{model}", "--dataset_name", "{rows}/none.jsonl"],
        "none.jsonl",
    ),
    "unknown option": (["--learning_rat", "1e-3"], "learning_rate"),
    "rank": (["--lora_r", "0"], "lora_r"),
    "target": (
        [*WHOLE, "--lora_target_modules", "q_prj"],
        "q_proj",
    ),
    "initialization": ([*WHOLE, "--init_lora_weights", "pissa"], "pissa"),
    "wandb": (
        [*WHOLE, "--report_to", "wandb"],
        "WANDB_MODE=offline",
    ),
    "experts": (
        [
            *("--model_name_or_path", "{moe}", "--dataset_name", "{rows}"),
            *("--lora_target_parameters", "experts.gate_up"),
        ],
        "--lora_target_parameters: 'experts.gate_up' matches no parameter; did you mean experts.gate_up_proj",
    ),
    "tracker": (
        [*WHOLE, "--report_to", "comet_ml"],
        "report_to: comet_ml: not installed here; `pip install comet-ml`",
    ),
    "schedule": (
        [*WHOLE, "--lr_scheduler_type", "cosine_with_min_lr"],
        "--lr_scheduler_type: cosine_with_min_lr: ",
    ),
    "upstream's own": (
        [*WHOLE, "--use_liger_kernel", "true"],
        "--use_liger_kernel: liger-kernel is not installed",
    ),
    "a batch that shrinks": ([*WHOLE, "--auto_find_batch_size", "true"], "on_oom: accumulate"),
    "LoRA+ on nothing": (
        [*WHOLE, "--use_peft", "false", "--load_in_4bit", "false", "--loraplus_lr_ratio", "16"],
        "loraplus_lr_ratio: has no effect without adapters",
    ),
    "not a checkpoint": (
        [*WHOLE, "--resume_from_checkpoint", "{rows}"],
        "failed verification: it has no manifest.json",
    ),
}


@pytest.mark.parametrize(
    ("lines", "place", "words"),
    [
        ("dataset_name: {here}/rows.json", 2, "dataset_name: {here}/rows.json: no such file or directory"),
        (
            "datasets:\n- path: {rows}\n- path: {here}/x.csv",
            4,
            "datasets[1].path: {here}/x.csv: no such file",
        ),
        ("dataset_name: {rows}\nadapter_name_or_path: {here}", 3, "adapter_name_or_path: "),
    ],
)
def test_an_input_that_is_not_there_has_its_line(
    model_dir: ModelDir, tmp_path: Path, rows, capsys, lines: str, place: int, words: str
) -> None:
    file, places = tmp_path / "run.yaml", {"here": tmp_path, "rows": rows("sft")}
    file.write_text(f"model_name_or_path: {model_dir('llama')}\n{lines.format(**places)}\n")
    assert (
        main(["sft", "--config", str(file), "--output_dir", str(tmp_path / "run"), "--report_to", "none"])
        == 2
    )
    printed = capsys.readouterr().err
    assert f"error: {file}:{place}: {words.format(**places)}" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_2_and_writes_nothing(
    model_dir: ModelDir, tmp_path: Path, rows, capsys, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    options, expected = MISTAKES[mistake]
    if mistake == "wandb":
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        import wandb

        wandb.teardown()
    places = {"model": model_dir("llama"), "moe": model_dir("qwen3_moe"), "rows": rows("sft")}
    output = tmp_path / "run"
    assert run("sft", output, *(option.format(**places) for option in options)) == 2
    error = capsys.readouterr().err
    message = error[error.index("error:") :]
    assert expected in message
    assert len(message.splitlines()) <= 10
    assert "Traceback" not in error
    assert not output.exists()


def test_a_used_output_directory_is_refused_or_moved_aside(
    model_dir: ModelDir, tmp_path: Path, rows, capsys
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    options = ("--model_name_or_path", str(model_dir("llama")), "--dataset_name", rows("sft"))
    assert run("sft", output, *options) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run("sft", output, *options, "--overwrite_output_dir") == 2
    assert "holds no run" in capsys.readouterr().err
    assert [p.name for p in output.iterdir()] == ["precious.txt"]
    (output / "run.json").write_text("{}")
    assert run("sft", output, *options, "--overwrite_output_dir") == 0
    assert (tmp_path / "run.1" / "precious.txt").read_text() == "mine"
    assert record(output)["status"] == "completed"


def test_what_a_run_reads_is_not_moved_aside(model_dir: ModelDir, tmp_path: Path, rows, capsys) -> None:
    """The adapter it starts from, in the directory that it would move: refused, and left where it was."""
    output = tmp_path / "sft"
    options = ("--model_name_or_path", str(model_dir("llama")), "--dataset_name", rows("sft"))
    assert run("sft", output, *options) == 0
    before = sorted(path.name for path in output.iterdir())
    again = ("--adapter_name_or_path", str(output), "--dataset_name", rows("sft"), "--overwrite_output_dir")
    assert run("sft", output, *again) == 2
    assert "which this run reads" in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == before
    assert not (tmp_path / "sft.1").exists()


@pytest.mark.parametrize("what", ["the configuration", "files of a mixture", "a file of the accelerator"])
def test_whatever_a_run_reads_is_not_moved_aside(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture, what: str
) -> None:
    output = tmp_path / "sft"
    inside = Path(tiny.write_rows(output / "rows", tiny.conversations(8)))
    (output / "run.json").write_text("{}")
    config = (output if what == "the configuration" else tmp_path) / "run.yaml"
    lines = [f"model_name_or_path: {model_dir('llama')}", f"output_dir: {output}", "run_name: sft"]
    if what == "files of a mixture":
        files = json.dumps({"train": str(inside / "train.jsonl")})
        lines += ["datasets:", "- path: json", f"  data_files: {files}"]
    else:
        lines.append(f"dataset_name: {tiny.write_rows(tmp_path / 'rows', tiny.conversations(8))}")
    if what == "a file of the accelerator":
        (output / "accelerator.json").write_text("{}")
        lines.append(f"accelerator_config: {output / 'accelerator.json'}")
    config.write_text("\n".join([*lines, "overwrite_output_dir: true", ""]))
    before = sorted(output.rglob("*"))
    assert main(["sft", "--config", str(config)]) == 2
    assert "which this run reads" in capsys.readouterr().err
    assert sorted(output.rglob("*")) == before
    assert not (tmp_path / "sft.1").exists()


def test_a_stream_of_which_no_row_is_left_is_an_error(model_dir: ModelDir, tmp_path: Path, capsys) -> None:
    """An untrained adapter would be saved as the result."""
    short = [{"prompt": tiny.text(n) * 40, "completion": " x"} for n in range(4)]
    data = tiny.write_rows(tmp_path / "rows", [*short, *short])
    options = ("--model_name_or_path", str(model_dir("llama")), "--dataset_name", data)
    streamed = ("--dataset_streaming", "true", "--max_length", "8")
    output = tmp_path / "run"
    assert run("sft", output, *options, *streamed) == 2
    assert "no row has a token to train on after truncation to max_length 8" in capsys.readouterr().err
    assert not output.exists()


def test_an_unexpected_failure_is_recorded_and_ends_with_1(
    model_dir: ModelDir, tmp_path: Path, rows, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails inside training is said in run.json, and no traceback is shown."""

    def fail(*args, **kwargs):
        raise RuntimeError("out of the blue")

    monkeypatch.setattr("trl.SFTTrainer.compute_loss", fail)
    output = tmp_path / "run"
    options = ("--model_name_or_path", str(model_dir("llama")), "--dataset_name", rows("sft"))
    assert run("sft", output, *options) == 1
    assert record(output)["status"] == "failed"
    assert "Traceback" not in capsys.readouterr().err
