"""Files of rows, and TRL's argument classes with the settings of a small CPU run."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from trl import DatasetMixtureConfig, DPOConfig, KTOConfig, RewardConfig, ScriptArguments, SFTConfig

from halfbyte.data import RunData, Text, load
from halfbyte.errors import UserError
from tests import tiny

Rows = list[dict[str, Any]]


@contextmanager
def refusal(*words: str) -> Iterator[None]:
    """The block is refused, in at most ten lines that have all of ``words``."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert len(message.splitlines()) <= 10
    for word in words:
        assert word in message, message


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """``write("a.jsonl", rows)``: a file or a saved data set; the ending of the name decides."""

    def write(name: str, rows: Rows) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list(rows) if path.suffix in (".parquet", ".arrow", "") else None
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows))
        elif path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".parquet":
            table.to_parquet(str(path))
        elif path.suffix == ".arrow":
            folder = tmp_path / f"{name}-saved"
            table.save_to_disk(str(folder))
            next(folder.glob("*.arrow")).rename(path)
        else:
            table.save_to_disk(str(path))
        return str(path)

    return write


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test reads into a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "seed": 7}


def sft(tmp_path: Path, **options: Any) -> SFTConfig:
    return SFTConfig(output_dir=str(tmp_path / "out"), **{**_CPU, **options})


def dpo(tmp_path: Path, **options: Any) -> DPOConfig:
    return DPOConfig(output_dir=str(tmp_path / "out"), **{**_CPU, **options})


def kto(tmp_path: Path, **options: Any) -> KTOConfig:
    return KTOConfig(output_dir=str(tmp_path / "out"), **{**_CPU, **options})


def reward(tmp_path: Path, **options: Any) -> RewardConfig:
    return RewardConfig(output_dir=str(tmp_path / "out"), **{**_CPU, **options})


def plain(**options: Any) -> SimpleNamespace:
    """The two fields that `load` reads of any trainer's config."""
    return SimpleNamespace(**{"seed": 7, "eval_strategy": "no", **options})


def run_data(name: str | None = None, training: Any = None, format: Any = Text, **options: Any) -> RunData:
    """`load` with a tiny tokenizer; other options go to ScriptArguments or DatasetMixtureConfig."""
    tokenizer = options.pop("tokenizer", None) or tiny.tokenizer()
    mixed = {key: options.pop(key) for key in ("datasets", "streaming", "test_split_size") if key in options}
    script = ScriptArguments(dataset_name=name, **options)
    return load(script, DatasetMixtureConfig(**mixed), training or plain(), format, tokenizer)
