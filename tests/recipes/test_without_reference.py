"""ORPO and CPO: equal to plain TRL in float32, through the API and the command line, and exact after a resume."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from halfbyte import QLoRAPlugin
from halfbyte.cli import main
from halfbyte.errors import UserError
from tests import launch, plain_trl, tiny
from tests.checkpoint.runs import assert_equal, interrupted, options, run
from tests.plain_trl import Steps

CLASSES = {"orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig)}
LOSSES = {
    "orpo": ("orpo", {}),
    "cpo": ("cpo", {"label_smoothing": 0.1}),
    "simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}),
    "alphapo": ("cpo", {"loss_type": "alphapo", "alpha": 0.25}),
    "ipo": ("cpo", {"loss_type": "ipo"}),
}


def tokenizer(base: Path) -> Any:
    """Without a beginning token, which TRL would put before every text."""
    found = AutoTokenizer.from_pretrained(base)
    found.bos_token = None
    return found


@pytest.fixture(scope="module")
def adapter(model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = QLoRAPlugin(dtype="float32").load(str(model_dir("llama")))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(output)
    return output


@pytest.fixture
def ours(model_dir: Callable[..., Path], tmp_path: Path, adapter: Path) -> Callable[..., Any]:
    def build(recipe: str, rows: list[dict], *, name: str = "ours", **given: Any) -> Any:
        trainer_cls, config = CLASSES[recipe]
        base = model_dir("llama")
        return QLoRAPlugin(dtype="float32", adapter_name_or_path=str(adapter)).trainer(
            trainer_cls,
            model=str(base),
            args=plain_trl.arguments(config, tmp_path / name, **given),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(base),
        )

    return build


@pytest.mark.parametrize("loss", LOSSES)
def test_steps_equal_plain_trl(
    ours: Callable[..., Any], model_dir: Callable[..., Path], tmp_path: Path, adapter: Path, loss: str
) -> None:
    recipe, given = LOSSES[loss]
    rows, base = tiny.preferences(24), model_dir("llama")
    trainer_cls, config = CLASSES[recipe]
    theirs = trainer_cls(
        model=PeftModel.from_pretrained(plain_trl.base(base), adapter, is_trainable=True),
        args=plain_trl.arguments(config, tmp_path / "theirs", max_steps=3, **given),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(base),
    )
    trainer = ours(recipe, rows, max_steps=3, **given)
    assert (trainer.report.fusion.layers, trainer.report.fusion.linears) == (2, 14)
    plain_trl.assert_equal(Steps.of(trainer), Steps.of(theirs))


@pytest.mark.parametrize("recipe", CLASSES)
def test_accumulated_batches_are_one_batch(
    ours: Callable[..., Any], model_dir: Callable[..., Path], recipe: str
) -> None:
    """Of rows of one length: TRL's likelihood is a mean over the tokens of a micro-batch."""
    encode = tokenizer(model_dir("llama"))
    words = [f" {word}" for word in tiny.WORDS if len(encode(f" {word}")["input_ids"]) == 1]
    assert len(words) >= 8
    rows = [
        {"prompt": "the" + words[n], "chosen": words[n + 1] + words[n + 2], "rejected": words[n + 2] * 2}
        for n in range(6)
    ]
    common = {"max_steps": 1, "train_sampling_strategy": "sequential"}
    one, several = (
        Steps.of(
            ours(
                recipe, rows, name=str(size), **common,
                per_device_train_batch_size=size, gradient_accumulation_steps=6 // size,
            )
        )
        for size in (6, 2)
    )  # fmt: skip
    plain_trl.assert_equal(several, one)


@pytest.mark.parametrize("recipe", CLASSES)
def test_dropout_of_adapters_is_off_unless_it_is_asked_for(
    model_dir: Callable[..., Path], tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_cls, config = CLASSES[recipe]
    for disabled in (True, False):
        args = plain_trl.arguments(config, tmp_path / "out", disable_dropout=disabled)
        trainer = QLoRAPlugin(dtype="float32", lora_dropout=0.5).trainer(
            trainer_cls,
            model=str(model_dir("llama")),
            args=args,
            train_dataset=Dataset.from_list(tiny.preferences(4)),
        )
        rates = {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)}
        assert (rates == {0}) == disabled
        assert ("lora_dropout: 0.5 has no effect" in capsys.readouterr().err) == disabled


@pytest.mark.parametrize("recipe", CLASSES)
def test_several_evaluation_sets_are_refused(ours: Callable[..., Any], recipe: str) -> None:
    trainer_cls, config = CLASSES[recipe]
    with pytest.raises(UserError, match="give one data set"):
        QLoRAPlugin(dtype="float32").trainer(
            trainer_cls,
            model=str(ours(recipe, tiny.preferences(4)).model.get_base_model().config._name_or_path),
            args=plain_trl.arguments(config, Path("out")),
            train_dataset=Dataset.from_list(tiny.preferences(4)),
            eval_dataset={"a": Dataset.from_list(tiny.preferences(4))},
        )


EVALUATED = {"eval_strategy": "steps", "eval_steps": "3", "eval_on_start": "true"}


@pytest.mark.parametrize("recipe", CLASSES)
def test_a_run(
    recipe: str, model_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.preferences(16)
    data, output = tiny.write_rows(tmp_path / "rows", rows), tmp_path / "run"
    words = options(model_dir("llama"), data, output, **{**EVALUATED, "max_steps": "3", "max_length": "30"})
    assert main([recipe, *words]) == 0
    said = capsys.readouterr()
    assert said.out.count("experimental: TRL may change or remove its") == 1
    assert f"{recipe.upper()}Trainer without notice" in said.out
    line = r"step 2/3  loss \S+  lr \S+  grad \S+  nll \S+  accuracy \d\.\d{3}  margin \S+  \S+ tok/s"
    assert any(re.fullmatch(line, each) for each in said.out.splitlines()), said.out
    line = r"step 0/3  eval  loss \S+  nll \S+  accuracy \S+  margin \S+"
    assert any(re.fullmatch(line, each) for each in said.out.splitlines()), said.out

    found = json.loads((output / "run.json").read_text())
    assert (found["status"], found["recipe"], found["steps"]) == ("completed", recipe, 3)
    encode = tiny.tokenizer()
    lengths = [
        len(encode(row["prompt"] + row[side])["input_ids"]) + 1
        for row in rows[:-4]
        for side in ("chosen", "rejected")
    ]
    assert found["data"]["tokens"] == sum(min(length, 30) for length in lengths)
    assert found["data"]["truncated"] == sum(
        max(pair) > 30 for pair in zip(lengths[::2], lengths[1::2], strict=True)
    )
    assert found["metrics"]["eval"]["eval_nll_loss"] > 0
    plots = {path.stem for path in (output / "plots").iterdir()}
    assert plots == {"loss", "learning_rate", "grad_norm", "accuracy", "margin", "nll", "logps"}
    assert "| eval_rewards/accuracies |" in (output / "README.md").read_text()


@pytest.mark.parametrize("recipe", CLASSES)
def test_a_resumed_run_is_the_uninterrupted_one(
    recipe: str, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    data = tiny.write_rows(tmp_path / "rows", tiny.preferences(12))
    given = {
        "gradient_accumulation_steps": "2", "logging_steps": "2", "eval_strategy": "steps", "eval_steps": "2",
        "disable_dropout": "false",
    }  # fmt: skip
    whole = tmp_path / "whole"
    assert run(recipe, options(model_dir("llama"), data, whole, **given)) == 0
    parts = interrupted(whole, tmp_path / "parts")
    again = options(model_dir("llama"), data, parts, **given)
    assert run(recipe, again, "--resume_from_checkpoint", "auto") == 0
    assert_equal(whole, parts)


@pytest.mark.parametrize("recipe", CLASSES)
def test_a_stream(recipe: str, model_dir: Callable[..., Path], tmp_path: Path) -> None:
    data, output = tiny.write_rows(tmp_path / "rows", tiny.preferences(12)), tmp_path / "run"
    words = options(model_dir("llama"), data, output, dataset_streaming="true", max_steps="2")
    assert run(recipe, words) == 0


@pytest.mark.parametrize("recipe", CLASSES)
@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("generate_during_eval", "true", "W&B or Comet only"),
        ("is_encoder_decoder", "true", "only encoder-decoder models"),
        ("max_completion_length", "64", "only encoder-decoder models"),
    ],
)
def test_what_has_no_effect_is_refused(
    recipe: str, option: str, value: str, reason: str, model_dir: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = options(model_dir("llama"), "rows", tmp_path / "run", **{option: value})
    assert main([recipe, *words]) == 2
    said = capsys.readouterr().err
    assert f"--{option}: " in said
    assert reason in said


@pytest.mark.parametrize("recipe", CLASSES)
def test_help_says_experimental(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([recipe, "--help"])
    assert "(experimental in TRL)" in capsys.readouterr().out


def test_trl_s_own_notice_is_not_printed(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    done = launch.halfbyte("orpo", "--model_name_or_path", nowhere, "--dataset_name", nowhere)
    assert done.returncode == 2
    assert nowhere in done.stderr
    assert "trl.experimental" not in done.stderr
