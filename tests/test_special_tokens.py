"""Template tokens that the vocabulary lacks: added by name, their rows trained, saved and reloaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.cli import main
from halfbyte.data import prepare_tokenizer
from halfbyte.data.chat.template import text_markers
from tests import tiny
from tests.data.conftest import sft

TOKENS = ["<|turn|>", "<|done|>"]
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|done|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.fixture
def template(tmp_path: Path) -> str:
    path = tmp_path / "turns.jinja"
    path.write_text(TEMPLATE)
    return str(path)


def options(model: Path, output: Path, template: str, rows: str) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--dataset_name", rows, "--output_dir", str(output)),
        *(
            "--chat_template_path",
            template,
            "--max_steps",
            "3",
            "--learning_rate",
            "1e-2",
            "--dtype",
            "float32",
        ),
        *("--per_device_train_batch_size", "2", "--save_strategy", "no", "--report_to", "none"),
    ]


def test_tokens_must_be_named(model_dir: Callable[..., Path], tmp_path: Path, template: str, capsys) -> None:
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(16))
    assert main(["sft", *options(model_dir("llama"), tmp_path / "run", template, rows)]) == 2
    error = capsys.readouterr().err
    assert 'additional_special_tokens: ["<|turn|>", "<|done|>"]\n' in error
    assert '--additional_special_tokens \'["<|turn|>", "<|done|>"]\'' in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arch", ["llama", "qwen3"], ids=["untied head", "tied head"])
def test_named_tokens_are_trained_saved_and_reloaded(
    model_dir: Callable[..., Path], tmp_path: Path, template: str, arch: str
) -> None:
    base, output = model_dir(arch), tmp_path / "run"
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(16))
    named = ("--additional_special_tokens", *TOKENS)
    assert main(["sft", *options(base, output, template, rows), *named]) == 0

    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    assert ids == [tiny.VOCABULARY, tiny.VOCABULARY + 1]
    assert tokenizer.chat_template == TEMPLATE

    # Reloaded by PEFT alone, as anybody would: the new rows are those that were trained.
    def reloaded() -> PeftModel:
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return PeftModel.from_pretrained(model, output)

    a, b = reloaded(), reloaded()
    prompt = tokenizer.apply_chat_template(
        tiny.conversations(1)[0]["messages"], return_tensors="pt", return_dict=True
    )
    assert set(ids) <= set(prompt["input_ids"].flatten().tolist())
    with torch.no_grad():
        first, second = a(**prompt).logits, b(**prompt).logits
    # Resizing drew other random rows; the trained ones replace them, in the embedding and in the head.
    assert torch.equal(first, second)

    # And the adapter starts a DPO run with its template, its tokens and an exact reference.
    pairs = tiny.write_rows(
        tmp_path / "pairs",
        [
            {
                "prompt": [{"role": "user", "content": tiny.text(n)}],
                "chosen": [{"role": "assistant", "content": tiny.text(n + 1)}],
                "rejected": [{"role": "assistant", "content": tiny.text(n + 2)}],
            }
            for n in range(16)
        ],
    )
    dpo = tmp_path / "dpo"
    arguments = [
        *("--adapter_name_or_path", str(output), "--dataset_name", pairs, "--output_dir", str(dpo)),
        *(
            "--max_steps",
            "2",
            "--dtype",
            "float32",
            "--per_device_train_batch_size",
            "2",
            "--save_strategy",
            "no",
        ),
        *("--report_to", "none", "--eval_strategy", "steps", "--eval_steps", "2", "--eval_on_start"),
    ]
    assert main(["dpo", *arguments]) == 0
    before = json.loads((dpo / "run.json").read_text())["metrics"]["before"]
    assert before["eval_loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert AutoTokenizer.from_pretrained(dpo).chat_template == TEMPLATE


def test_another_template_than_the_adapters_is_an_error(
    model_dir: Callable[..., Path], tmp_path: Path, template: str, capsys
) -> None:
    base, output = model_dir("llama"), tmp_path / "run"
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(16))
    named = ("--additional_special_tokens", *TOKENS)
    assert main(["sft", *options(base, output, template, rows), *named]) == 0
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATE.replace("<|turn|>{{", "<|turn|> {{"))
    arguments = options(base, tmp_path / "again", str(other), rows)
    assert main(["sft", *arguments, "--adapter_name_or_path", str(output)]) == 2
    error = capsys.readouterr().err
    assert str(other) in error
    assert str(output) in error
    assert not (tmp_path / "again").exists()


MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_an_empty_list_takes_markers_as_ordinary_text(
    model_dir: Callable[..., Path], tmp_path: Path, capsys
) -> None:
    base, template, output = model_dir("llama"), tmp_path / "marked.jinja", tmp_path / "run"
    template.write_text(MARKED)
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(16))
    assert main(["sft", *options(base, output, str(template), rows)]) == 2
    assert "additional_special_tokens: []" in capsys.readouterr().err

    assert (
        main(["sft", *options(base, output, str(template), rows), "--additional_special_tokens", "[]"]) == 0
    )
    line = "chat template: <|assistant|>, <|user|> are no tokens of the vocabulary but ordinary text"
    assert line in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert len(tokenizer) == tiny.VOCABULARY
    assert tokenizer.chat_template == MARKED
    adapter = load_file(output / "adapter_model.safetensors")
    assert not [name for name in adapter if "embed" in name or "lm_head" in name]
    assert json.loads((output / "adapter_config.json").read_text())["trainable_token_indices"] is None

    # The adapter goes on with its template, which is not asked about again.
    again = [
        "--adapter_name_or_path",
        str(output),
        "--dataset_name",
        rows,
        "--output_dir",
        str(tmp_path / "on"),
    ]
    assert main(["sft", *again, "--max_steps", "1", "--report_to", "none", "--dtype", "float32"]) == 0
    assert line in capsys.readouterr().out


def test_markers_that_are_ordinary_text_train_as_text(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(chat_template=MARKED)
    messages = tiny.conversations(1)[0]["messages"]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    text = "".join(f"<|{m['role']}|>\n{m['content']}<|im_end|>\n" for m in messages)
    assert ids == tokenizer(text)["input_ids"]
    assert len(tokenizer("<|user|>")["input_ids"]) > 1
    assert text_markers(tokenizer) == ["<|assistant|>", "<|user|>"]
    assert text_markers(tiny.tokenizer()) == []
    assert text_markers(tiny.tokenizer(chat_template=None)) == []


def test_the_end_token_of_another_model_is_not_taken_with_its_text(model_dir, tmp_path: Path) -> None:
    """A template taken from a model whose end token this vocabulary lacks keeps this one's."""
    other = tiny.tokenizer(chat_template=MARKED)
    other.add_tokens(["<|stop|>"], special_tokens=True)
    other.eos_token = "<|stop|>"
    other.save_pretrained(tmp_path / "other")
    training = sft(tmp_path, chat_template_path=str(tmp_path / "other"))
    ours, added = prepare_tokenizer(str(model_dir("llama")), training=training, additional_special_tokens=[])
    assert (ours.eos_token, added, training.eos_token) == ("<|im_end|>", [], None)
