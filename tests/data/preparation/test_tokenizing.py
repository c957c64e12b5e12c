"""Rows are tokenized in batches and by several processes into the very columns that TRL makes row by row."""

import random

import datasets
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer, KTOTrainer, SFTTrainer
from trl.data_utils import _tokenize, extract_prompt, unpair_preference_dataset

from halfbyte.data import PreferencePairs, Text, UnpairedPreferences, counted
from halfbyte.data.preparation.encoding import Encoder, batches_alike
from halfbyte.data.preparation.mapping import workers
from halfbyte.errors import UserError
from tests import tiny
from tests.data.conftest import dpo, kto, refusal, run_data, sft, turn
from tests.data.preparation.test_prepared import build

# Tools and options are printed; the prompt alone ends in a block that the whole conversation has not.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    + tiny.CHAT_TEMPLATE
    + "{% if add_generation_prompt and quick %}the fox<|im_end|>{% endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {name: {"type": kind}}}}
    for name, kind in (("a", "string"), ("b", ["null"]))
]


def talk(n, turns=2):
    roles = [("user", "assistant")[at % 2] for at in range(turns)]
    return [turn(role, tiny.text(n + at)) for at, role in enumerate(roles)]


TALKS = [{"messages": talk(n, 2 + 2 * (n % 2))} for n in range(40)]
ASKED = [{"prompt": talk(n, 1), "completion": [turn("assistant", tiny.text(n + 7))]} for n in range(40)]
# "qu" + "ick": the last token of the prompt is another one in the whole.
TEXTS = [{"prompt": tiny.text(n) + " the qu", "completion": "ick " + tiny.text(n + 1)} for n in range(40)]
PAIRS = [
    {
        "prompt": talk(n, 1 + 2 * (n % 2)),
        "chosen": [turn("assistant", tiny.text(n + 2))],
        "rejected": [turn("assistant", tiny.text(n + 3))],
    }
    for n in range(40)
]
WHOLE = [
    {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PAIRS
]
BESIDE = [{"tools": TOOLS[: n % 3] or None, "chat_template_kwargs": {"quick": n % 2 == 0}} for n in range(40)]


def beside(rows):
    return [{**row, **more} for row, more in zip(rows, BESIDE, strict=True)]


SFT = {
    "text": (tiny.texts(40), {}),
    "text cut": (tiny.texts(40), {"max_length": 8}),
    "text cut at the end": (tiny.texts(40), {"max_length": 8, "truncation_mode": "keep_end"}),
    "text without limit": (tiny.texts(40), {"max_length": None}),
    "text packed": (tiny.texts(40), {"packing": True, "max_length": 32}),
    "text completions": (TEXTS, {"max_length": 24}),
    "text completions, all labelled": (TEXTS, {"completion_only_loss": False}),
    "text completions, packed": (TEXTS, {"packing": True, "max_length": 24}),
    "messages": (TALKS, {}),
    "messages, shuffled": (TALKS, {"max_length": 48, "shuffle_dataset": True}),
    "messages, tools and options": (beside(TALKS), {}),
    "messages, assistant": (TALKS, {"assistant_only_loss": True, "max_length": 48}),
    "messages, assistant, tools": (beside(TALKS), {"assistant_only_loss": True}),
    "completions": (ASKED, {"max_length": 30}),
    "completions, all labelled": (ASKED, {"completion_only_loss": False}),
    "completions, tools and options": (beside(ASKED), {}),
    "completions, assistant": (beside(ASKED), {"assistant_only_loss": True}),
    "completions, assistant, all": (ASKED, {"assistant_only_loss": True, "completion_only_loss": False}),
    "completions, cut at the end": (ASKED, {"max_length": 12, "truncation_mode": "keep_end"}),
}
DPO = {
    "text": (tiny.preferences(40), {}),
    "text, long prompts": (tiny.preferences(40), {"max_length": 9}),
    "text, implicit prompt": (
        [{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in tiny.preferences(40)],
        {},
    ),
    "conversations": (PAIRS, {"max_length": 40}),
    "conversations, cut at the end": (PAIRS, {"max_length": 40, "truncation_mode": "keep_end"}),
    "conversations, tools and options": (beside(PAIRS), {}),
    "conversations, implicit prompt": (WHOLE, {}),
}

KTO = {
    "text": ([{**row, "label": n % 3 == 0} for n, row in enumerate(TEXTS)], {}),
    "text, long prompts": ([{**row, "label": n % 3 == 0} for n, row in enumerate(TEXTS)], {"max_length": 14}),
    "conversations": ([{**row, "label": n % 2 == 0} for n, row in enumerate(beside(ASKED))], {"max_length": 40}),
    "without a KL term": ([{**row, "label": n % 2 == 0} for n, row in enumerate(ASKED)],
                          {"loss_type": "apo_zero_unpaired"}),
}  # fmt: skip


def same(trainer_cls, format, path, training, processes):
    tokenizer = tiny.tokenizer(chat_template=TEMPLATE)
    data = run_data(path, training, format, tokenizer=tokenizer)
    expected = build(trainer_cls, data, training, tokenizer).train_dataset
    training.dataset_num_proc = processes
    datasets.disable_caching()
    try:
        found = build(counted(trainer_cls, data.report), data, training, tokenizer).train_dataset
    finally:
        datasets.enable_caching()
    assert found.column_names == expected.column_names
    assert found.features == expected.features
    assert found[:] == expected[:]
    assert len(found) > 0
    return data.report


@pytest.mark.parametrize("case", SFT)
@pytest.mark.filterwarnings("ignore")
def test_sft_columns_equal_trl(write, tmp_path, case):
    rows, options = SFT[case]
    same(SFTTrainer, Text, write("a.jsonl", rows), sft(tmp_path, **options), None)


@pytest.mark.parametrize("case", DPO)
@pytest.mark.filterwarnings("ignore")
def test_dpo_columns_equal_trl(write, tmp_path, case):
    rows, options = DPO[case]
    same(DPOTrainer, PreferencePairs, write("a.jsonl", rows), dpo(tmp_path, **options), None)


@pytest.mark.parametrize("case", KTO)
@pytest.mark.parametrize("processes", [None, 2])
@pytest.mark.filterwarnings("ignore")
def test_kto_columns_equal_trl(write, tmp_path, case, processes):
    rows, options = KTO[case]
    training = kto(tmp_path, per_device_train_batch_size=3, **options)
    same(KTOTrainer, UnpairedPreferences, write("a.jsonl", rows), training, processes)


@pytest.mark.parametrize("case", ["text", "text, implicit prompt", "conversations, tools and options"])
@pytest.mark.parametrize("batches", [True, False], ids=["in batches", "by TRL"])
@pytest.mark.filterwarnings("ignore")
def test_pairs_are_trained_by_kto_as_trl_unpairs_them(write, tmp_path, monkeypatch, case, batches):
    """The same rows, whoever tokenizes them; they are shuffled, so that batches have both labels."""
    rows, options = DPO[case]
    rows = [*rows, {**rows[0], "rejected": rows[0]["chosen"]}] * 3
    path, training = write("a.jsonl", rows), kto(tmp_path, per_device_train_batch_size=4, **options)
    tokenizer = tiny.tokenizer(chat_template=TEMPLATE)
    if not batches:
        monkeypatch.setattr("halfbyte.data.preparation.tokenizing.batches_alike", lambda tokenizer: False)
    with pytest.raises(UserError, match="equal in 3 of 123 rows"):
        run_data(path, training, UnpairedPreferences, tokenizer=tokenizer)
    data = run_data(write("a.jsonl", rows[:40]), training, UnpairedPreferences, tokenizer=tokenizer)
    pairs = data.train if "prompt" in data.train.column_names else data.train.map(extract_prompt)
    data.train = unpair_preference_dataset(pairs).shuffle(seed=training.seed)
    expected = build(KTOTrainer, data, training, tokenizer).train_dataset
    data = run_data(write("a.jsonl", rows[:40]), training, UnpairedPreferences, tokenizer=tokenizer)
    found = build(counted(KTOTrainer, data.report), data, training, tokenizer).train_dataset
    columns = ["prompt_ids", "completion_ids", "KL_completion_ids", "label"]
    assert found.select_columns(columns)[:] == expected.select_columns(columns)[:]
    assert len(found) == 80
    assert data.report.train.rows == 40
    if batches:
        assert data.report.train.tokens == sum(len(r["prompt_ids"] + r["completion_ids"]) for r in found)
    assert not any("stand together" in note for note in data.report.notes)


def test_a_stray_label_beside_pairs_decides_nothing(write, tmp_path):
    rows = [{**row, "label": False} for row in tiny.preferences(12)]
    training = kto(tmp_path, per_device_train_batch_size=4)
    data = run_data(write("a.jsonl", rows), training, UnpairedPreferences)
    found = build(counted(KTOTrainer, data.report), data, training).train_dataset
    assert sum(found["label"]) == 12


def test_rows_sorted_by_their_label_are_reported(write, tmp_path):
    rows = [{**row, "label": n < 20} for n, row in enumerate(TEXTS)]
    for order, told in ((rows, True), (random.Random(0).sample(rows, 40), False)):
        training = kto(tmp_path, per_device_train_batch_size=4)
        data = run_data(write("a.jsonl", order), training, UnpairedPreferences)
        build(counted(KTOTrainer, data.report), data, training)
        assert any("rows of one label stand together" in note for note in data.report.notes) == told


@pytest.mark.parametrize("case", ["text packed", "completions, tools and options"])
def test_the_number_of_processes_changes_nothing_for_sft(write, tmp_path, case):
    rows, options = SFT[case]
    report = same(SFTTrainer, Text, write("a.jsonl", rows), sft(tmp_path, **options), 2)
    # The odd prompts end in a block of their own, which is said.
    assert any("in 20 rows the prompt ends in other tokens" in n for n in report.notes) == ("tools" in case)


def test_the_number_of_processes_changes_nothing_for_dpo(write, tmp_path):
    rows, options = DPO["conversations, implicit prompt"]
    same(DPOTrainer, PreferencePairs, write("a.jsonl", rows), dpo(tmp_path, **options), 2)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_row_that_the_template_refuses_late_is_named(write, tmp_path, monkeypatch, kind, processes):
    monkeypatch.setattr("halfbyte.data.rows.RENDERED", 0)
    template = "{% if 'cat' in messages[-1].content %}{{ raise_exception('no cats') }}{% endif %}" + TEMPLATE
    tokenizer = tiny.tokenizer(chat_template=template)
    trainer_cls, format, rows, config = (
        (SFTTrainer, Text, TALKS, sft) if kind == "sft" else (DPOTrainer, PreferencePairs, PAIRS, dpo)
    )
    rows = [dict(row) for row in rows] * 4  # 160, of which one is dropped before
    column = "messages" if kind == "sft" else "rejected"
    if kind == "dpo":
        rows[3] = {**rows[3], "rejected": rows[3]["chosen"]}
    rows[140] = {**rows[140], column: [*rows[140][column][:-1], turn("assistant", "a cat")]}
    training = config(tmp_path, dataset_num_proc=processes)
    data = run_data(write("a.jsonl", rows), training, format, tokenizer=tokenizer)
    with refusal("train row 141", "no cats"):
        build(counted(trainer_cls, data.report), data, training, tokenizer)


def test_what_is_prepared_once_is_read_again_by_any_number_of_processes(write, tmp_path):
    path, training = write("a.jsonl", TALKS), sft(tmp_path)
    files = []
    for processes in (None, 2):
        training.dataset_num_proc = processes
        data = run_data(path, training, tokenizer=tiny.tokenizer())
        rows = build(counted(SFTTrainer, data.report), data, training).train_dataset
        files.append([file["filename"] for file in rows.cache_files])
    assert files[0] == files[1] != []


def byte_level(**added):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken(text, **options) for text, options in added.items()])
    return tokenizer


def metaspace(normalizer=None, scheme="first"):
    model = Tokenizer(models.Unigram())
    model.normalizer = normalizer
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    model.decoder = decoders.Metaspace()
    special = ["<|im_start|>", "<|im_end|>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator([tiny.text(n) + " <|>/ab\n" for n in range(200)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", unk_token="<unk>")


TOKENIZERS = {
    "byte level": byte_level,
    "a token around another": lambda: byte_level(**{"a<|im_start|>": {"special": True}}),
    "a token that begins as another": lambda: byte_level(**{"<|im_start|>a": {"special": True}}),
    "a token that takes spaces": lambda: byte_level(**{"<x>": {"lstrip": True, "rstrip": True}}),
    "a whole word": lambda: byte_level(**{"<x>": {"single_word": True}}),
    "normalized": lambda: byte_level(**{"<x>": {"normalized": True}}),
    "metaspace at the first": metaspace,
    "metaspace always": lambda: metaspace(scheme="always"),
    "stripped": lambda: metaspace(normalizers.Sequence([normalizers.Strip(), normalizers.Prepend("_")])),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_sides_share_the_tokens_of_their_prompt_exactly(name):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<x>a{% endif %}"
    )
    assert batches_alike(tokenizer)
    draw = random.Random(name)
    parts = ["<|im_start|>", "<|im_end|>", "<x>", "a", "the fox", " ", "\n", "  b", "<", "|>", "/", "tok"]
    sides = []
    for _ in range(300):
        prompt = "".join(draw.choices(parts, k=draw.randrange(1, 9)))
        rest = ["".join(draw.choices(parts, k=draw.randrange(1, 6))) for _ in range(2)]
        sides.append([[turn("user", prompt)], *([turn("user", prompt + more)] for more in rest)])
    found = Encoder(tokenizer).conversations(0, [{}] * len(sides), sides, prompted=True)
    for row, ids in zip(sides, found, strict=True):
        given = [{"add_generation_prompt": True}, {}, {}]
        expected = [_tokenize(tokenizer, s, **o)["input_ids"] for s, o in zip(row, given, strict=True)]
        assert ids == expected, row


@pytest.mark.parametrize("name", TOKENIZERS)
def test_conversations_that_begin_alike_have_the_tokens_of_each_alone(monkeypatch, name):
    monkeypatch.setattr("halfbyte.data.preparation.encoding.BEGINNING", 3)
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    draw = random.Random(name)
    parts = ["<|im_start|>", "<|im_end|>", "<x>", "a", "the fox", " ", "\n", "  b", "<", "|>", "/", "tok"]
    systems = ["".join(draw.choices(parts, k=draw.randrange(3, 9))) for _ in range(6)]
    texts = [draw.choice(systems) + "".join(draw.choices(parts, k=draw.randrange(6))) for _ in range(300)]
    sides = [[[turn("user", text)]] for text in texts]
    found = Encoder(tokenizer).conversations(0, [{}] * len(sides), sides)
    for (messages,), (ids,) in zip(sides, found, strict=True):
        assert ids == _tokenize(tokenizer, messages)["input_ids"], messages


def test_a_system_message_of_many_rows_is_tokenized_once_a_batch(monkeypatch):
    tokenizer, given = tiny.tokenizer(), []
    encoder = Encoder(tokenizer)
    encode = encoder._ids

    def counting(texts, **options):
        given.extend(texts)
        return encode(texts, **options)

    monkeypatch.setattr(encoder, "_ids", counting)
    system = turn("system", tiny.text(1) * 20)
    encoder.conversations(0, [{}] * 50, [[[system, *talk(n)]] for n in range(50)])
    assert sum(system["content"] in text for text in given) == 1
    assert len(given) == 50


@pytest.mark.parametrize(
    "options",
    [{"truncation": True, "max_length": 5}, {"tokenizer_kwargs": {"split_special_tokens": True}}],
)
def test_options_of_the_tokenization_in_a_row_hold_for_that_row(options):
    tokenizer, messages = tiny.tokenizer(), talk(3)
    found = Encoder(tokenizer).conversations(0, [options, {}], [[messages]] * 2)
    assert found[0][0] == _tokenize(tokenizer, messages, **options)["input_ids"]
    assert found[1][0] == _tokenize(tokenizer, messages)["input_ids"]


@pytest.mark.parametrize(
    ("given", "rows", "cores", "ranks", "expected"),
    [
        (None, 100_000, 8, 2, 4),
        (None, 2_500, 8, 1, 2),
        (None, 100, 8, 1, None),
        (None, 100_000, 2, 4, None),
        (3, 100, 8, 1, 3),
        (1, 100_000, 8, 1, None),
    ],
)
def test_as_many_processes_as_the_rank_has_cores(monkeypatch, given, rows, cores, ranks, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert workers(given, rows) == expected
