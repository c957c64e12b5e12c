"""Settings are immutable, build the dataclasses they describe, and lay an error to the option at fault."""

import json
import os
import warnings
from dataclasses import dataclass

import pytest
from trl import GRPOConfig, KTOConfig
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

from halfbyte.config import RunArguments
from halfbyte.config.settings import names_option
from halfbyte.errors import UserError, about
from tests.config.reading import DPO, FourBit, parse, refusal


def test_later_decisions_make_new_settings() -> None:
    got = parse("--lora_r", "8", defaults={"learning_rate": 2e-4, "lora_r": 32})
    assert (got["learning_rate"], got["lora_r"]) == (2e-4, 8)
    decided = got.with_defaults(lora_r=64, optim="adamw_torch").with_values(lora_alpha=128)
    assert (decided["lora_r"], decided["optim"], decided["lora_alpha"]) == (8, "adamw_torch", 128)
    assert decided.resolved()["optim"] == "adamw_torch"
    assert (got["optim"], got["lora_alpha"]) == (parse()["optim"], parse()["lora_alpha"])
    assert decided.given == got.given
    assert (decided.at("lora_r"), decided.at("optim")) == ("--lora_r", "optim")
    with pytest.raises(TypeError):
        got.given["optim"] = got.given["lora_r"]  # type: ignore[index]
    for unknown in (got.with_values, got.with_defaults):
        with pytest.raises(AssertionError, match="no field is named nope"):
            unknown(nope=1)
    with pytest.raises(AssertionError):
        parse(defaults={"nope": 1})


@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_both_spellings_of_checkpointing_take_effect(config, key: str, value: bool) -> None:
    got = config(f"{key}: {str(value).lower()}\nuse_cpu: true\nbf16: false\noutput_dir: out\n")
    assert got["gradient_checkpointing"] is value
    assert "gradient_checkpointing" in got.given
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        training = got.build()[1]
    assert training.gradient_checkpointing is training.activation_checkpointing is value
    assert not os.path.exists("out")


def test_build_gives_each_class_its_own(config) -> None:
    text = """
        output_dir: out
        use_cpu: true
        bf16: false
        optim: adamw_torch
        lora_target_modules: [all-linear]
        dataset_name: rows.jsonl
        overwrite_output_dir: true
        lr_scheduler_kwargs: {num_cycles: 2}
        datasets: [{path: a, data_files: {train: b}}, {path: c}]
    """
    got = config(text, "--model_init_kwargs", '{"a": {"b": 2e-4}}', "--include_for_metrics", "[]")
    run, training, model, mixture = got.build()
    assert isinstance(run, RunArguments)
    assert run.overwrite_output_dir
    assert (training.optim, training.lr_scheduler_kwargs) == ("adamw_torch", {"num_cycles": 2})
    assert training.model_init_kwargs == {"a": {"b": 2e-4}}
    assert model.lora_target_modules == "all-linear"
    assert got["lora_target_modules"] == ["all-linear"]
    assert mixture.datasets == [DatasetConfig("a", data_files={"train": "b"}), DatasetConfig("c")]
    assert json.loads(json.dumps(got.resolved()))["datasets"][1]["path"] == "c"
    assert got.build()[3].datasets == mixture.datasets
    assert os.listdir() == ["run.yaml"]


def test_build_names_the_keys_upstream_refuses(config) -> None:
    both = config("output_dir: out\nuse_cpu: true\nfp16: true\nbf16: true")
    assert refusal(both.build).startswith("run.yaml:3: fp16, run.yaml:4: bf16: At most one")
    kwargs = config("use_cpu: true\nbf16: false\naccelerator_config: {split: true}")
    assert "split" in refusal(kwargs.build)
    weights = config("loss_type: [ipo, sft]\nloss_weights: [1]\nuse_cpu: true\nbf16: false", classes=DPO)
    assert "run.yaml:2: loss_weights" in refusal(weights.build)


@pytest.mark.parametrize("owner", [GRPOConfig, KTOConfig])
def test_a_third_party_class_builds(owner: type) -> None:
    got = parse(
        "--use_cpu",
        "--bf16=false",
        "--max_steps=2",
        classes=(RunArguments, owner, FourBit, DatasetMixtureConfig),
    )
    assert got.build()[1].max_steps == 2


def test_an_error_is_put_where_its_option_was_written(config) -> None:
    got = config("output_dir: out\nlora_r: 8\n", "--optim", "adamw_torch")
    for option, head in [
        ("lora_r", "run.yaml:2: lora_r: "),
        ("optim", "--optim: "),
        ("seed", "seed: "),
        ("--launch", "--launch: "),
        (None, ""),
    ]:
        error = UserError("8 is wrong: again", option=option)
        assert got.placed(error) is error
        assert str(error) == f"{head}8 is wrong: again"
    row = got.placed(UserError("no text", option="lora_r", split="train", row=3))
    assert str(row) == "run.yaml:2: lora_r: train row 3: no text"


def test_a_class_that_refuses_its_own_option_is_believed(config) -> None:
    @dataclass
    class Own:
        fast: str = "auto"
        lora_r: int = 8

        def __post_init__(self) -> None:
            raise UserError("not with this lora_r", option="fast")

    got = config("fast: none\nlora_r: 4", classes=(Own,))
    assert refusal(got.build) == "run.yaml:1: fast: not with this lora_r"


@pytest.mark.parametrize(
    ("key", "text", "named"),
    [
        ("fast", "there is no fast version of this tokenizer", False),
        ("fast", "fast and beta are words", False),
        ("beta", "a beta release", False),
        ("seed", "seed the generator first", False),
        ("dtype", "expected dtype float but got half", False),
        ("optim", "optimizer and optim differ", False),
        ("debug", "run with debug on", False),
        ("project", "the project was not found", False),
        ("seed", "seed == 3 failed", False),
        ("seed", "data_seed=3 failed", False),
        ("seed", "write --data-seed or --seed-all", False),
        ("max_length", "max_length_of is missing", False),
        ("fast", "'faster' is not 'fast ' or it's", False),
        ("fast", "`fast` must be true", True),
        ("fast", "``fast`` must be true", True),
        ("seed", "got an unexpected keyword argument 'seed'", True),
        ("optim", 'the option "optim" is unknown', True),
        ("dtype", "pass --dtype, or nothing", True),
        ("beta", "DPO with beta=0 is undefined", True),
        ("beta", "`beta=0` is undefined", True),
        ("max_length", "max_length must be set", True),
        ("max_length", "args.max_length (3) is too small", True),
        ("fp16", "At most one of fp16 and bf16 can be True", True),
        ("loss_weights", "Length of loss_weights list (1) must match", True),
        ("max_length", "use --max_length 3", True),
    ],
)
def test_what_names_an_option(key: str, text: str, named: bool) -> None:
    assert names_option(text, key) is named


def test_an_upstream_error_is_laid_to_the_options_it_names(config) -> None:
    got = config("seed: 3\nmax_length: 7\noutput_dir: out\n")
    assert str(got.refusal(ValueError("seed it\nwith max_length"), "sft")) == (
        "run.yaml:2: max_length: seed it with max_length"
    )
    one = got.refusal(ValueError("bad `seed`"), "sft")
    assert (str(one), one.option) == ("run.yaml:1: seed: bad `seed`", "seed")
    assert str(got.refusal(ValueError("no fast seed"), "sft")) == "sft: no fast seed"
    assert got.refusal(ValueError("`seed` and max_length"), "sft").option is None


def test_a_place_within_a_value_has_its_own_line(config) -> None:
    got = config("datasets:\n  - path: a\n    columns: [x]\n  - path: b\nmodel_name_or_path: m\n")
    for option, head in [
        ("datasets", "run.yaml:1: datasets"),
        ("datasets[0].path", "run.yaml:2: datasets[0].path"),
        ("datasets[0].columns[0]", "run.yaml:3: datasets[0].columns[0]"),
        ("datasets[1].path", "run.yaml:4: datasets[1].path"),
        ("datasets[1].split", "run.yaml:1: datasets[1].split"),
        ("adapter_name_or_path", "run.yaml:5: model_name_or_path"),
    ]:
        assert str(got.placed(UserError("is wrong", option=option))) == f"{head}: is wrong"
    line = parse("--datasets", '{"path": "a"}', "--model_name_or_path", "x")
    for option, head in [
        ("datasets[0].path", "--datasets[0].path"),
        ("adapter_name_or_path", "--model_name_or_path"),
    ]:
        assert str(line.placed(UserError("is wrong", option=option))) == f"{head}: is wrong"


def test_an_error_without_an_option_is_laid_to_the_one_it_is_about() -> None:
    with pytest.raises(UserError) as caught, about("dataset_name"), about("seed"):
        raise UserError("no such file")
    assert str(caught.value) == "seed: no such file"
    with pytest.raises(UserError, match=r"^output_dir: full"), about("dataset_name"):
        raise UserError("full", option="output_dir")
