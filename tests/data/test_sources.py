"""Every kind of source gives the same rows; every mistake names what is there and what to do."""

import json
import os
from pathlib import Path

import datasets
import pytest

from halfbyte.errors import UserError
from tests import tiny
from tests.data.conftest import plain, refusal, run_data

ROWS = tiny.texts(20)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "saved"])
@pytest.mark.parametrize("mixture", [False, True])
def test_every_local_source_gives_the_rows(write, name, mixture):
    path = write(name, ROWS)
    data = run_data(datasets=[{"path": path}]) if mixture else run_data(path)
    assert data.train["text"][:] == [row["text"] for row in ROWS]
    assert data.report.as_dict()["rows"] == 20
    assert data.eval is None


@pytest.mark.parametrize("streaming", [False, True])
def test_both_splits_of_a_directory_and_of_a_saved_dict(write, tmp_path, streaming):
    write("files/train.jsonl", ROWS)
    write("files/test.jsonl", ROWS[:3])
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "saved"))
    for name in ("files", "saved"):
        data = run_data(
            str(tmp_path / name), plain(eval_strategy="steps"), dataset_streaming=streaming, format=None
        )
        assert len(list(data.train)) == 20
        assert len(list(data.eval)) == 3


def test_a_part_of_a_saved_dict_in_a_mixture(tmp_path, write):
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "saved"))
    parts = [{"path": str(tmp_path / "saved"), "split": "test"}, {"path": write("b.jsonl", ROWS[5:7])}]
    data = run_data(datasets=parts)
    assert data.train["text"][:] == [row["text"] for row in ROWS[:3] + ROWS[5:7]]


def test_the_test_split_of_a_mixture_is_drawn_by_the_seed(write):
    path = write("a.jsonl", [{"text": str(n)} for n in range(50)])
    drawn = [
        run_data(
            datasets=[{"path": path}], test_split_size=0.2, training=plain(eval_strategy="steps", seed=seed)
        )
        for seed in (1, 1, 2)
    ]
    first, again, other = [data.eval["text"][:] for data in drawn]
    assert len(first) == 10
    assert first == again != other
    assert drawn[0].report.train.sha == drawn[1].report.train.sha


def test_the_sha_is_of_the_content_and_not_of_the_file(write):
    shas = [run_data(write(name, ROWS)).report.train.sha for name in ("a.jsonl", "b.json", "c.jsonl")]
    assert len(set(shas)) == 1
    assert len(shas[0]) == 64
    changed = [*ROWS[:-1], {"text": ROWS[-1]["text"] + "."}]
    assert run_data(write("d.jsonl", changed)).report.train.sha != shas[0]


def test_a_path_with_pattern_characters_is_one_file(write):
    write("a1.jsonl", ROWS[:2])
    assert run_data(write("a[1].jsonl", ROWS)).report.train.rows == 20


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow", "saved", "files/train.jsonl"])
def test_edited_rows_are_read_whatever_the_times_of_the_file(write, tmp_path, name, mixture):
    """As `cp -p`, rsync and tar leave a file: another content, the modification time that it had."""
    path = Path(write(name, [{"text": "one"}]))
    source = path.parent if path.parent.name == "files" else path

    def read() -> list[str]:
        named = {"datasets": [{"path": str(source)}]} if mixture else {"name": str(source)}
        return run_data(**named).train.map(lambda row: {"again": row["text"]})["again"][:]

    assert read() == ["one"]
    file = next(path.glob("data*.arrow")) if path.is_dir() else path
    kept = file.stat()
    other = Path(write(f"other/{name}", [{"text": "two"}]))
    new = next(other.glob("data*.arrow")) if other.is_dir() else other
    file.write_bytes(new.read_bytes())
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert read() == ["two"]


def refused(*words: str, **options) -> None:
    with refusal(*words):
        run_data(**options)


def test_a_missing_split_names_the_ones_there_are(write, tmp_path):
    path = write("a.jsonl", ROWS)
    refused(
        "dataset_test_split", "'test'", "found: train", "test_split_size",
        name=path, training=plain(eval_strategy="steps"),
    )  # fmt: skip
    refused("dataset_train_split", "'trian'", "did you mean train?", name=path, dataset_train_split="trian")


def test_options_that_would_be_ignored(write):
    path = write("a.jsonl", ROWS)
    part = [{"path": path}]
    refused("no data", "dataset_name", "datasets:")
    refused("dataset_name", "leave one of the two out", name=path, datasets=part)
    refused("dataset_streaming", "streaming: true", dataset_streaming=True, datasets=part)
    refused("streaming", "dataset_streaming: true", name=path, streaming=True)
    refused("test_split_size", "datasets:", name=path, test_split_size=0.5)
    refused("dataset_config", "leave it out", name=path, dataset_config="en")
    refused("test_split_size", "stream", datasets=part, streaming=True, test_split_size=0.5)


def test_a_refusal_names_the_option_or_the_part_that_it_is_about(write, tmp_path: Path):
    good, none = write("a.jsonl", ROWS), str(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": ')
    for name in (none, str(tmp_path / "bad.jsonl"), str(tmp_path / "bad.xls"), "no/such-hub-id"):
        if name.endswith(".xls"):
            Path(name).write_bytes(b"x")
        with pytest.raises(UserError) as one:
            run_data(name)
        assert one.value.option == "dataset_name", name
        with pytest.raises(UserError) as part:
            run_data(datasets=[{"path": good}, {"path": name}])
        assert part.value.option == "datasets[1].path", name
        assert part.value.what == one.value.what


def test_files_that_cannot_be_read(write, tmp_path: Path):
    write("train.jsonl", ROWS)
    refused("no such file", "did you mean train.jsonl?", name=str(tmp_path / "trian.jsonl"))
    refused("no such file", datasets=[{"path": str(tmp_path / "none.csv")}])
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    refused(".gz is not read", "parquet", name=str(tmp_path / "a.jsonl.gz"))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    refused("the file is empty", name=str(tmp_path / "empty.jsonl"))
    (tmp_path / "folder").mkdir()
    for name, content in (("empty", b""), ("full", json.dumps(ROWS[0]).encode())):
        (tmp_path / "folder" / f"{name}.jsonl").write_bytes(content)
    refused("empty.jsonl: the file is empty", name=str(tmp_path / "folder"))
    (tmp_path / "cut.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"text": "b"\n')
    refused("cut.jsonl: cannot be read", "line 2, column 13", name=str(tmp_path / "cut.jsonl"))
    for name in ("bad.parquet", "bad.arrow"):
        (tmp_path / name).write_text("hello")
        refused(f"{name}: not a whole", "write or download it again", name=str(tmp_path / name))
    (tmp_path / "none").mkdir()
    refused("no data files", "jsonl", name=str(tmp_path / "none"))


def test_a_directory_whose_files_would_be_passed_over(write, tmp_path):
    write("d/train.jsonl", ROWS)
    write("d/more.jsonl", ROWS)
    refused("1 of its files would not be read", "more.jsonl", name=str(tmp_path / "d"))


def test_an_unknown_hub_id_offline():
    refused("someone/something", "HF_HUB_OFFLINE is set", "local path", name="someone/something")
    refused("someone/something", "HF_HUB_OFFLINE is set", datasets=[{"path": "someone/something"}])


def test_an_unknown_column_of_a_mixture(write):
    refused("cannot be read", "texts", datasets=[{"path": write("a.jsonl", ROWS), "columns": ["texts"]}])


def test_a_test_split_that_nothing_evaluates_is_named(write, tmp_path: Path) -> None:
    write("files/train.jsonl", ROWS)
    assert run_data(str(tmp_path / "files")).report.notes == []
    write("files/test.jsonl", ROWS[:3])
    said = "split 'test' is there and nothing is evaluated on it; `eval_strategy: steps` does"
    assert run_data(str(tmp_path / "files")).report.notes == [said]
    evaluates = plain(eval_strategy="steps", eval_steps=1)
    assert run_data(str(tmp_path / "files"), evaluates).report.notes == []
