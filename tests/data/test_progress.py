"""Every pass over the data tells how far it is, those of the datasets library and of TRL among them."""

import pytest
from datasets import arrow_dataset, builder
from datasets.utils import tqdm
from trl import SFTTrainer

from halfbyte.data import counted
from halfbyte.terminal import passes
from tests import tiny
from tests.data.conftest import run_data, sft
from tests.data.preparation.test_prepared import build


@pytest.mark.parametrize("packing", [False, True])
def test_every_pass_over_the_data_is_shown(write, tmp_path, monkeypatch, capsys, packing):
    monkeypatch.setattr(passes, "QUIET", 0.0)
    path = write("a.jsonl", tiny.conversations(60))
    training = sft(tmp_path, max_length=20, packing=packing)
    data = run_data(path, training)
    build(counted(SFTTrainer, data.report), data, training)
    said = capsys.readouterr().out
    expected = ["reading train", "hashing train", "checking train", "looking for turn delimiters in train"]
    expected += [
        "tokenizing train",
        "counting tokens",
        "packing train dataset" if packing else "truncating train",
    ]
    assert [label for label in expected if f"{label}: " not in said] == []


def test_the_library_has_its_bars_again(write):
    run_data(write("a.jsonl", tiny.conversations(6)))
    assert arrow_dataset.hf_tqdm is builder.hf_tqdm is tqdm
