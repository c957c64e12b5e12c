"""Tokens and templates are taken by name, added by name, and refused with what to write."""

import json
import os
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from halfbyte.data import prepare_tokenizer
from halfbyte.data.chat import limited
from halfbyte.data.chat.template import stop_ids
from halfbyte.errors import UserError
from tests import tiny
from tests.data.conftest import dpo, refusal, sft

LLAMA3 = (
    "{# not a token: <|comment|> #}{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
)
PHI3 = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
NEEDED = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture
def base(tmp_path):
    tiny.tokenizer(chat_template=None).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def refused(*words: str, path: str, training, **options) -> None:
    with refusal(*words):
        prepare_tokenizer(path, training=training, **options)


def test_a_template_file(base, tmp_path):
    file = tmp_path / "chatml.jinja"
    file.write_text(tiny.CHAT_TEMPLATE)
    training = sft(tmp_path, chat_template_path=str(file))
    tokenizer, added = prepare_tokenizer(base, training=training)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert added == []
    assert stop_ids(tokenizer) == {2}


def test_missing_tokens_are_added_by_name_only_and_come_back(base, tmp_path):
    file = tmp_path / "llama.jinja"
    file.write_text(LLAMA3)
    training = sft(tmp_path, chat_template_path=str(file))
    refused("writes 3 tokens", "additional_special_tokens: [", *NEEDED, path=base, training=training)
    refused("writes 1 tokens", '["<|eot_id|>"]', path=base, training=training,
            additional_special_tokens=NEEDED[:2])  # fmt: skip
    tokenizer, added = prepare_tokenizer(
        base, training=training, additional_special_tokens=[*NEEDED, "<pad>"]
    )
    assert added == [tiny.VOCABULARY, tiny.VOCABULARY + 1, tiny.VOCABULARY + 2]
    assert stop_ids(tokenizer) == {2, added[2]}
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("a<|eot_id|>")["input_ids"][-1] == added[2]
    assert again.decode(added, skip_special_tokens=True) == ""
    assert again.chat_template == LLAMA3


def test_tokens_put_together_by_the_template_are_found(base, tmp_path):
    file = tmp_path / "phi.j2"
    file.write_text(PHI3)
    training = sft(tmp_path, chat_template_path=str(file))
    refused("<|user|>, <|assistant|>", path=base, training=training)


def test_every_template_that_trl_ships_is_read_or_its_tokens_named(base, tmp_path, monkeypatch):
    # A process for each of the templates would take long; see tests/data/chat/test_limited.py.
    monkeypatch.setattr(limited, "excess", lambda template: None)
    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    assert len(files) > 30
    named = {}
    for file in files:
        try:
            prepare_tokenizer(base, training=sft(tmp_path, chat_template_path=str(file)))
        except UserError as error:
            named[file.name] = str(error)
    assert "<|eot_id|>" in named["llama3.jinja"]
    assert "<end_of_turn>" in named["gemma.jinja"]
    assert "<|end|>" in named["phi3.jinja"]
    assert all("additional_special_tokens" in message for message in named.values())


def test_the_template_of_another_model(base, tmp_path):
    other = tiny.tokenizer(chat_template=LLAMA3)
    other.add_special_tokens({"eos_token": "<|eot_id|>"})
    other.add_tokens([*NEEDED[:2], "<|unused|>"], special_tokens=True)
    other.save_pretrained(tmp_path / "other")
    training = sft(tmp_path, chat_template_path=str(tmp_path / "other"))
    refused("writes 3 tokens", *NEEDED, path=base, training=training)
    tokenizer, added = prepare_tokenizer(base, training=training, additional_special_tokens=NEEDED)
    assert tokenizer.chat_template == LLAMA3
    assert "<|unused|>" not in tokenizer.get_vocab()
    assert len(tokenizer) == tiny.VOCABULARY + 3
    assert (tokenizer.eos_token, training.eos_token) == ("<|eot_id|>", "<|eot_id|>")
    assert stop_ids(tokenizer) == {added[2]}


def test_template_paths_that_cannot_be_used(base, tmp_path):
    (tmp_path / "chatml.jinja").write_text("{% for m in messages %}\n{{ m[ }}{% endfor %}")
    (tmp_path / "plain.txt").write_text("x")
    for name, words in {
        "chatlm.jinja": ["no file", "did you mean chatml.jinja?"],
        "chatml.jinja": ["chatml.jinja:2: "],
        "plain.txt": [".jinja or .j2"],
        "base": ["has no chat template"],
        "nothing": ["there is no directory"],
    }.items():
        training = sft(tmp_path, chat_template_path=str(tmp_path / name))
        refused("chat_template_path", *words, path=base, training=training)


def test_end_and_pad_tokens_must_be_in_the_vocabulary(base, tmp_path):
    refused("eos_token", "'<|im_endd|>'", "did you mean <|im_end|>?", path=base,
            training=sft(tmp_path, eos_token="<|im_endd|>"))  # fmt: skip
    refused("pad_token", "'<nopad>'", path=base, training=dpo(tmp_path, pad_token="<nopad>"))
    training = sft(tmp_path, eos_token="<|im_start|>", pad_token="<|endoftext|>")
    tokenizer, _ = prepare_tokenizer(base, training=training)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|endoftext|>")


def test_the_end_pads_where_nothing_else_does(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    prepared, _ = prepare_tokenizer(str(tmp_path / "base"), training=dpo(tmp_path))
    assert prepared.pad_token == "<|im_end|>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    refused("no pad token and no end token", path=str(tmp_path / "endless"), training=dpo(tmp_path))


def test_tokenizers_and_tokens_that_cannot_be(base, tmp_path):
    refused("no tokenizer could be loaded", path=str(tmp_path / "nowhere"), training=sft(tmp_path))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "llama"}')
    refused(
        "bare: no tokenizer files in this folder; copy tokenizer.json", path=str(bare), training=sft(tmp_path)
    )
    refused("''", "not a token", path=base, training=sft(tmp_path), additional_special_tokens=[""])


BAD = b"{{ messages }}\n{# caf\xe9 #}"


def test_a_template_that_is_not_utf_8_is_refused_by_line_and_byte(base, tmp_path):
    (tmp_path / "bad.jinja").write_bytes(BAD)
    where = "bad.jinja:2: the template is not UTF-8 at byte 21; save it as UTF-8"
    refused(where, path=base, training=sft(tmp_path, chat_template_path=str(tmp_path / "bad.jinja")))
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_bytes(BAD)
    where = "other/chat_template.jinja:2: the template is not UTF-8"
    refused(where, path=str(tmp_path / "other"), training=sft(tmp_path))
    training = sft(tmp_path, chat_template_path=str(tmp_path / "other"))
    refused("chat_template_path", where, path=base, training=training)


def test_what_is_no_template_is_refused_and_not_waited_for(base, tmp_path):
    os.mkfifo(tmp_path / "pipe.jinja")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory.jinja").mkdir()
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "tokenizer.json")
    for name, words in {
        "pipe.jinja": ["pipe.jinja is not a file"],
        "pipe": ["pipe: a template file must end in .jinja or .j2"],
        "directory.jinja": ["directory.jinja is not a file"],
        "model": ["tokenizer.json is not a file"],
        "bas": ["there is no directory", "did you mean", "/base?"],
    }.items():
        training = sft(tmp_path, chat_template_path=str(tmp_path / name))
        refused("chat_template_path", *words, path=base, training=training)


def test_an_id_beyond_all_vocabularies_is_refused(tmp_path):
    """`tokenizers` fills a slot for every id below it when it is copied: gigabytes, and the process aborts."""
    tiny.tokenizer().save_pretrained(tmp_path / "chat")
    file = tmp_path / "chat" / "tokenizer.json"
    content = json.loads(file.read_text())
    word = next(iter(content["model"]["vocab"]))
    content["model"]["vocab"][word] = 2**31
    file.write_text(json.dumps(content))
    refused("a token of id 2,147,483,648", path=str(tmp_path / "chat"), training=sft(tmp_path))


@pytest.mark.parametrize("name", ["~/chat", "~/own.jinja"])
def test_a_tilde_is_the_home_directory(base, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.tokenizer().save_pretrained(tmp_path / "chat")
    (tmp_path / "own.jinja").write_text(tiny.CHAT_TEMPLATE)
    tokenizer, _ = prepare_tokenizer(base, training=sft(tmp_path, chat_template_path=name))
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
