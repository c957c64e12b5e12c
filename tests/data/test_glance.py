"""Rows that Arrow clears are rows in which nothing is found when they are looked at one by one."""

import random

import datasets
import numpy as np
import pytest
from transformers import AddedToken

from halfbyte.data import PreferencePairs, Text, UnpairedPreferences
from halfbyte.data.chat.delimiters import _Check, turn_delimiters
from halfbyte.data.formats import Layout
from halfbyte.data.kinds import text
from halfbyte.data.rows import RowCheck, numbered
from halfbyte.errors import UserError
from tests import tiny
from tests.data.conftest import turn

ROLES = ["user", "assistant", "assistant", "assistant", "bot", None]


def talk(draw, content):
    """A conversation in which something may be odd, of any shape that Arrow stores with the others."""
    turns = [turn(draw.choice(ROLES[: draw.choice([2, 6])]), content()) for _ in range(draw.randrange(4))]
    return turns if draw.random() < 0.95 else None


def rows_of(draw, columns):
    """Rows whose columns are mostly sound, each column with keys of its own."""
    extra = draw.choice([None, "weight", "name", "tool_calls"])

    def value(kind):
        if kind == "talk":
            made = talk(draw, lambda: draw.choice(["a", "", "b", "c"]) if draw.random() < 0.97 else None)
            for each in made or []:
                if extra is not None and draw.random() < 0.5:
                    each[extra] = {"weight": draw.choice([0, 1]), "name": "a", "tool_calls": [{"a": "b"}]}[
                        extra
                    ]
            return made
        if kind == "text":
            return "a" if draw.random() < 0.95 else None
        return draw.choice([True, False]) if draw.random() < 0.95 else None

    return [{name: value(kind) for name, kind in columns.items()} for _ in range(30)]


CASES = {
    "messages": (Text, {"messages": "talk"}),
    "messages that the assistant answers": (Text, {"messages": "talk"}),
    "text": (Text, {"text": "text"}),
    "completions": (Text, {"prompt": "talk", "completion": "talk"}),
    "completions as text": (Text, {"prompt": "text", "completion": "text"}),
    "of two kinds": (Text, {"prompt": "text", "completion": "talk"}),
    "pairs": (PreferencePairs, {"prompt": "talk", "chosen": "talk", "rejected": "talk"}),
    "pairs without prompts": (PreferencePairs, {"chosen": "talk", "rejected": "talk"}),
    "unpaired": (UnpairedPreferences, {"prompt": "text", "completion": "text", "label": "truth"}),
}


def layout_of(format, columns):
    return next(layout for layout in format.layouts if set(layout.columns) == set(columns))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("conversational", [True, False])
def test_every_row_that_is_refused_is_in_doubt(monkeypatch, case, conversational):
    monkeypatch.setattr("halfbyte.data.rows.RENDERED", 0)
    format, columns = CASES[case]
    check = RowCheck(
        "train",
        layout_of(format, columns),
        tiny.tokenizer(),
        conversational=conversational,
        assistant_only="answers" in case,
    )
    cleared = 0
    for seed in range(60):
        rows = datasets.Dataset.from_list(rows_of(random.Random(seed), columns))
        doubts = check.doubtful(rows.with_format("arrow")[:], 0)
        if doubts is None:
            continue
        for row, doubtful in zip(rows, doubts, strict=True):
            cleared += not doubtful
            if not doubtful:
                check(1, row, render=False)
    alone = not {"prompt", "chosen"} & columns.keys() or "talk" not in columns.values()
    right = ("talk" in columns.values()) == conversational and alone
    assert (cleared > 0) == right


TEMPLATES = {
    "im_start": tiny.CHAT_TEMPLATE,
    "cuts": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('%%')[-1] }}<|im_end|>{% endfor %}",
    "text": "{% for m in messages %}[{{ m.role | upper }}] {{ m.content }} [/END_OF_TURN]\n{% endfor %}",
    "changing": tiny.CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | replace('a', '') }}"),
}
PIECES = [
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<",
        "|",
        "|>",
        "im",
        "_end",
        "end|>",
        "IM_S",
        "\u017fTART",
        "\u212a",
        " ",
        "\n",
    ),
    *(
        "a",
        "b c",
        "%%",
        "%",
        "[/END_OF",
        "_TURN]",
        "[",
        "]",
        "[/",
        "END",
        "<think>",
        "<th",
        "ink>",
        "\u3000",
        "\x1f",
    ),
    *("\u00e9", "\u00df", "<x>", "user", "start"),
]


@pytest.mark.parametrize("policy", ["error", "allow"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_row_with_a_delimiter_or_an_added_token_is_in_doubt(name, policy):
    tokenizer = tiny.tokenizer(chat_template=TEMPLATES[name])
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("<x>", special=True), AddedToken("é")])
    check = _Check(turn_delimiters(tokenizer), tokenizer, None, Layout({"messages": text}), policy)
    draw = random.Random(name + policy)
    rows = [
        {
            "messages": [
                {
                    "role": draw.choice(["user", "assistant"]),
                    "content": "".join(draw.choices(PIECES, k=draw.randrange(5))),
                    "note": "".join(draw.choices(PIECES[7:], k=draw.choice([0, 0, 1, 2]))) or None,
                    "calls": draw.choice([None, None, None, ["a", "<|im_end|>"]]),
                }
                for _ in range(draw.randrange(1, 3))
            ],
            "tools": draw.choice([None, None, None, '["<|im_end|>"]']),
        }
        for _ in range(400)
    ]
    data = datasets.Dataset.from_list(rows)
    doubts = check.doubtful(data.with_format("arrow")[:], 0)
    found = [bool(check.count(row, ["messages", "tools"])) for row in data]
    assert any(found)
    if doubts is None:
        assert (name, policy) == ("changing", "error")
        return
    missed = [rows[at] for at in np.flatnonzero(np.array(found) & ~doubts)]
    assert missed == []
    assert not doubts.all()


def test_rows_that_are_cleared_are_not_yielded_and_the_others_keep_their_numbers():
    data = datasets.Dataset.from_dict({"a": list(range(2500))}).select(range(2499, -1, -1))

    def doubtful(table, begin):
        held = np.asarray(table["a"])
        return None if begin == 2000 else (held % 1000 == 7) | (held >= 10**6)

    found = list(numbered(data, ["a"], doubtful=doubtful))
    assert found[:2] == [(493, {"a": 2007}), (1493, {"a": 1007})]
    assert found[2:] == [(2500 - a, {"a": a}) for a in range(499, -1, -1)]


def test_the_lowest_row_is_named_whatever_is_wrong_with_it(monkeypatch):
    monkeypatch.setattr("halfbyte.data.rows.RENDERED", 0)
    rows = [{"messages": [turn("user", "a"), turn("assistant", "b")]} for _ in range(3000)]
    rows[1700] = {"messages": [turn("user", None)]}
    rows[1600] = {"messages": [turn("pirate", "a")]}
    check = RowCheck("train", layout_of(Text, {"messages": ""}), tiny.tokenizer(), conversational=True)
    with pytest.raises(UserError, match=r"train row 1601: .*pirate"):
        check.all(datasets.Dataset.from_list(rows))
