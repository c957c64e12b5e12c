"""What YAML and the command line resolve to, and what is refused with which words."""

import os
import time
from pathlib import Path

import pytest
from trl import GRPOConfig, ModelConfig, SFTConfig

from halfbyte.config import reading
from halfbyte.config.sources import MAX_BYTES, MAX_DEPTH
from halfbyte.config.written import collect
from halfbyte.errors import UserError
from tests.config.reading import DPO, parse, refusal


def test_command_line_over_yaml_over_default(config) -> None:
    text = "# a comment\nlearning_rate: 2e-4\nlora_r: 8\noutput_dir: out\n"
    got = config(
        text, "--lora_r=4", "--lora-alpha", "8", "--packing", "--lora_target_modules", "q_proj", "v_proj"
    )
    assert (got["learning_rate"], got["lora_r"], got["lora_alpha"], got["packing"]) == (2e-4, 4, 8, True)
    assert got["lora_target_modules"] == ["q_proj", "v_proj"]
    assert str(got.given["learning_rate"]) == "run.yaml:2"
    assert str(got.given["lora_r"]) == "--lora_r"
    assert "lora_dropout" not in got.given
    assert got.at("output_dir") == "run.yaml:4: output_dir"
    assert (got.at("lora_r"), got.at("seed")) == ("--lora_r", "seed")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 2e-4", "learning_rate", 2e-4),
        ("learning_rate: '2e-4'", "learning_rate", 2e-4),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("report_to: none", "report_to", "none"),
        ("report_to: [wandb, tensorboard]", "report_to", ["wandb", "tensorboard"]),
        ("run_name: 1.10", "run_name", "1.10"),
        ("run_name: off", "run_name", "off"),
        ("packing: off", "packing", False),
        ("packing: Yes", "packing", True),
        ("max_length:", "max_length", None),
        ("max_length: none", "max_length", None),
        ("save_steps: 500", "save_steps", 500),
        ("save_steps: 0.1", "save_steps", 0.1),
        ("num_train_epochs: 3", "num_train_epochs", 3.0),
        ("max_steps: -1", "max_steps", -1),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "true"),
        ("trackio_static_space_id: false", "trackio_static_space_id", False),
        ("fsdp: true", "fsdp", True),
        ("deepspeed: auto.json", "deepspeed", "auto.json"),
        ("pad_to_multiple_of: 64", "pad_to_multiple_of", 64),
        ("lora_target_modules: all-linear", "lora_target_modules", ["all-linear"]),
        ("lora_target_modules: '[qv]_proj'", "lora_target_modules", ["[qv]_proj"]),
        ("lora_target_modules: '[\"q\", \"v\"]'", "lora_target_modules", ["q", "v"]),
        ("model_init_kwargs: {a: 2e-4, b: no, c: '1', d: [1, ~]}", "model_init_kwargs",
         {"a": 2e-4, "b": False, "c": "1", "d": [1, None]}),
        ("test_split_size: 100", "test_split_size", 100),
        ("seed: 1_000", "seed", 1000),
    ],
)  # fmt: skip
def test_values(config, text: str, key: str, value: object) -> None:
    got = config(text)[key]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_r: true", "lora_r: must be a whole number"),
        ("max_steps: 3.7", "max_steps: must be a whole number"),
        ("max_steps: 1e3", "max_steps: must be a whole number"),
        ("seed: 010", "seed: must be a whole number"),
        ("seed: 99999999999999999999", "below 2^63"),
        ("learning_rate: [1, 2]", "learning_rate: must be a number, is a list of 2"),
        ("learning_rate: {a: 1}", "learning_rate: must be a number, is a mapping"),
        ("learning_rate:", "learning_rate: must be a number, is null"),
        ("learning_rate: fast", "learning_rate: must be a number, is 'fast'"),
        ("packing: 3", "packing: must be true or false"),
        ("packing_strategy: nope", "write one of bfd, bfd_split, wrapped"),
        ("optim: paged_adamw", "did you mean paged_adamw_8bit or paged_adamw_32bit"),
        ("lr_scheduler_type: cosin", "; did you mean cosine"),
        ("eval_strategy: always", "write one of no, steps, epoch"),
        ("save_strategy: never", "write one of no, steps, epoch, best"),
        ("hub_strategy: x", "every_save"),
        ("dtype: bf16", "write one of auto, bfloat16"),
        ("report_to: wandbb", "; did you mean wandb"),
        ("report_to:", "write none or wandb"),
        ("debug: everything", "underflow_overflow"),
        ("pad_to_multiple_of: many", "write one of auto, or a whole number"),
        ("liger_kernel_config: words", "must be a mapping"),
        ("model_init_kwargs: words", "must be a mapping"),
        ("model_init_kwargs: {a: .nan}", "model_init_kwargs.a: must be a finite number"),
        ("datasets: rows", "must be a mapping"),
        ("datasets:\n  - path: a\n    fraction: much", "run.yaml:3: datasets[0].fraction: must be a number"),
        ("datasets:\n  - path: a\n  - pth: b", "run.yaml:3: datasets[1]: unknown key 'pth'; did you mean path?"),
        ("datasets:\n  - split: a", "run.yaml:2: datasets[0]: path is missing"),
        ("datasets:\n  - path: a\n    path: b", "run.yaml:3: path: given twice (first at run.yaml:2)"),
        ("learning_rat: 1", "did you mean learning_rate?"),
        ("learning-rate: 1", "write learning_rate"),
        ("lora: 1", "unknown option"),
        ("warmup_ratio: 0.03", "write warmup_steps"),
        ("config: other.yaml", "cannot name another"),
        ("env: {A: b}", "on the command line"),
        ("num_processes: 2", "accelerate launch --num_processes N"),
        ("mixed_precision: bf16", "accelerate launch"),
        ("accelerate_config: fsdp2", "accelerate launch"),
        ("1: 2", "1: unknown option"),
        ("<<: {seed: 1}", "<<: unknown option"),
        ("? [a, b]\n: 1", "a key must be a name"),
        ("seed: 1\nlora_r: 2\nseed: 1", "run.yaml:3: seed: given twice (first at run.yaml:1)"),
        ("- seed", "is a list"),
        ("seed", "is a single value"),
        ("a: b: c", "run.yaml:1: not valid YAML"),
        ("a: [1\n", "not valid YAML"),
        ("seed: &x 1\ndata_seed: *x", "run.yaml:2: aliases (*name) are not supported"),
        ("seed: !!python/object:os.system 1", "tags are not supported"),
        ("seed: 1\n---\nseed: 2", "not valid YAML"),
        ('run_name: "\\U99999999"', "not valid YAML"),
        ("a: " + "[" * 5000, f"nested more than {MAX_DEPTH} levels"),
        ("model_init_kwargs: '" + '{"a":' * 5000 + "'", "not valid JSON"),
        (b"seed: 1\nrun_name: \xff", "run.yaml:2: not UTF-8"),
        (b"run_name: \x00", "not valid YAML"),
        (b"#" * (MAX_BYTES + 1), "a configuration is a short YAML file"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_refused_in_yaml(config, text: str | bytes, words: str) -> None:
    message = refusal(config, text)
    assert words in message
    assert message.startswith("run.yaml:")
    assert os.listdir() == ["run.yaml"]


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("learning_rate", "0 -1 nan .inf -.inf 1e999", "1e-9"),
        ("per_device_train_batch_size", "0 -1", "1"),
        ("per_device_eval_batch_size", "0", "1"),
        ("gradient_accumulation_steps", "0", "1"),
        ("num_train_epochs", "0 -1 inf", "0.5"),
        ("max_steps", "0 -2", "-1 1"),
        ("lora_r", "0 -8", "1"),
        ("lora_alpha", "0", "1"),
        ("lora_dropout", "1 -0.1 nan", "0 0.99"),
        ("warmup_steps", "-1 -0.1", "0 0.03 10"),
        ("weight_decay", "-0.1", "0"),
        ("max_grad_norm", "-1", "0"),
        ("max_length", "0 -1", "1"),
        ("logging_steps", "0", "0.1"),
        ("save_steps", "0", "0.1"),
        ("eval_steps", "0", "0.1"),
        ("save_total_limit", "0", "1"),
        ("seed", "-1 4294967296", "0 4294967295"),
        ("adam_beta1", "1 -0.1", "0"),
        ("adam_beta2", "1", "0.99"),
        ("adam_epsilon", "0 1e300 2", "1e-8"),
        ("learning_rate", "1e300 1e39 1e7", "1 1e-30"),
        ("weight_decay", "1e300 1001", "100"),
        ("max_grad_norm", "1e300 1e13", "1e9"),
        ("num_train_epochs", "1e300", "0.5 1000"),
        ("warmup_steps", "1e300", "100000"),
        ("lora_alpha", "99999999999999999999", "4096"),
        ("label_smoothing_factor", "1 -0.1", "0.1"),
        ("test_split_size", "0 -1 1.5", "0.1 1 100"),
        ("dataloader_num_workers", "10000", "0 128"),
        ("dataset_num_proc", "10000", "128"),
        ("max_length", "1000000000000", "10000000"),
        ("per_device_eval_batch_size", "1000000000000", "4096"),
        ("lora_r", "1000000", "1024"),
    ],
)
def test_ranges(config, key: str, bad: str, good: str) -> None:
    for text in bad.split():
        assert f"run.yaml:1: {key}: must be" in refusal(config, f"{key}: {text}")
        assert refusal(parse, f"--{key}", text).startswith(f"--{key}: must be")
    for text in good.split():
        assert config(f"{key}: {text}")[key] == float(text)


def test_ranges_follow_the_class(config) -> None:
    for text in ("0", "-0.1"):
        assert "beta: must be greater than 0" in refusal(config, f"beta: {text}", classes=DPO)
    assert config("beta: 0", classes=(GRPOConfig, ModelConfig))["beta"] == 0
    assert "beta: must be at least 0" in refusal(config, "beta: -1", classes=(GRPOConfig, ModelConfig))
    assert "label_smoothing: must be" in refusal(config, "label_smoothing: 0.5", classes=DPO)
    assert "loss_type" in refusal(config, "loss_type: [sigmoid, sigmoidal]", classes=DPO)
    assert config("loss_type: ipo", classes=DPO)["loss_type"] == ["ipo"]
    assert "reverse_kl" in refusal(config, "f_divergence_type: kl", classes=DPO)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rat", "1"], "--learning_rat: unknown option; did you mean learning_rate?"),
        (["--learning", "1"], "--learning: unknown option"),
        (["--seed"], "--seed: needs a value"),
        (["--seed", "1", "2"], "--seed: must be a whole number, is a list of 2"),
        (["--seed", "1", "--seed", "1"], "--seed: given twice"),
        (["--seed=1", "2"], "'2': belongs to no option"),
        (["run.yaml"], "'run.yaml': belongs to no option"),
        (["-c", "run.yaml"], "'-c': belongs to no option"),
        (["--"], "belongs to no option"),
        (["--config"], "--config: takes the path"),
        (["--config="], "--config: takes the path"),
        (["--config", "a", "b"], "--config: takes the path"),
        (["--config", "a", "--config=b"], "--config: given twice"),
        (["--config", "missing.yaml"], "cannot read 'missing.yaml': No such file"),
        (["--config", "."], "cannot read '.': Is a directory"),
        (["--config", "a\0b"], "cannot read"),
        (["--num_processes", "2"], "-m halfbyte sft"),
        (["--env", "A=b"], "environment variables"),
        (["--model_init_kwargs", '{"a": 1, "a": 2}'], "'a' is given twice"),
        (["--model_init_kwargs", '{"a": NaN}'], "--model_init_kwargs.a: must be a finite number"),
        (["--model_init_kwargs", "[1]"], "must be a mapping"),
        (
            ["--datasets", '{"path": "a"}', '{"path": 1, "split": null}'],
            "--datasets[1].split: must be text, is null",
        ),
        (["--report_to"], "--report_to: needs a value"),
    ],
)
def test_refused_on_the_command_line(argv: list[str], words: str) -> None:
    assert words in refusal(parse, *argv)


def test_flags() -> None:
    assert parse("--packing", "--no_gradient_checkpointing", "--no-logging_nan_inf_filter")["packing"] is True
    assert parse("--no_gradient_checkpointing")["gradient_checkpointing"] is False
    assert parse("--packing", "false")["packing"] is False
    assert parse("--fsdp")["fsdp"] is True
    assert "unknown option" in refusal(parse, "--no_seed")


def test_all_mistakes_are_named_in_order_and_counted(config) -> None:
    message = refusal(config, "lora_r: 0\nnope: 1\nlora_r: 2\nseed: x\n", "--max_steps", "a")
    assert [line.split(" ")[0] for line in message.splitlines()] == [
        "run.yaml:1:", "run.yaml:2:", "run.yaml:3:", "run.yaml:4:", "--max_steps:",
    ]  # fmt: skip
    many = refusal(config, "".join(f"nope{i}: {i}\n" for i in range(30)))
    assert many.splitlines()[-1] == "... and 21 more"
    assert len(refusal(config, "x" * 5000 + ": 1\nseed: " + "y" * 5000)) < 500


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeffseed: 42\n", "{}\n"])
def test_files_that_say_nothing(config, text: str) -> None:
    assert config(text).resolved() == parse().resolved()


def test_checkpointing_spellings_that_differ(config) -> None:
    message = refusal(config, "gradient_checkpointing: true\nactivation_checkpointing: false")
    assert message.startswith(
        "run.yaml:2: activation_checkpointing: differs from gradient_checkpointing (run.yaml:1)"
    )
    same = config("gradient_checkpointing: false\nactivation_checkpointing: false")
    assert same["gradient_checkpointing"] is False


def test_rules_between_fields(config) -> None:
    assert config("load_in_8bit: true")["load_in_4bit"] is False
    assert config("use_peft: false\nload_in_4bit: false")["use_peft"] is False
    assert "keep one" in refusal(config, "load_in_8bit: true\nload_in_4bit: true")
    assert refusal(config, "use_peft: false").startswith("run.yaml:1: use_peft: a 4-bit base")
    assert parse("--load_in_8bit", classes=(SFTConfig, ModelConfig))["load_in_4bit"] is False


def test_names_are_looked_up_for_the_lines_that_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    monkeypatch.setattr(reading, "suggestion", lambda name, known: looked_up.append(name) or "")
    message = refusal(parse, *(f"--no_such_option_{number}=1" for number in range(5000)))
    assert message.splitlines()[-1] == "... and 4991 more"
    assert len(looked_up) <= 10


@pytest.mark.parametrize("line", ["learning_rat{n}: 1\n", "seed: 1\n", "- {n}\n", "k{n}: [1, 2, 3]\n"])
def test_a_file_of_a_megabyte_is_refused_in_seconds(tmp_path: Path, line: str) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("".join(line.format(n=n) for n in range(90_000))[: 1 << 20])
    start = time.process_time()
    with pytest.raises(UserError, match="more than 20,000 keys and values"):
        collect(["--config", str(path)])
    assert time.process_time() - start < 20


def test_a_pipe_is_read_if_somebody_writes_to_it(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(UserError, match="a pipe that nothing is written to"):
        collect(["--config", str(path)])
    read, write = os.pipe()
    os.write(write, b"seed: 7\n")
    os.close(write)
    assert collect(["--config", f"/dev/fd/{read}"]).file.nodes["seed"].value == "7"
    os.close(read)
