"""`halfbyte report` says what each scheme costs: its figures are those of the weights and the rows."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.cli import main
from halfbyte.export import schemes
from halfbyte.export.findings import PLAIN
from halfbyte.quantization import load_base
from tests import plain_trl, tiny

ModelDir = Callable[..., Path]
SCHEMES = [scheme.name for scheme in (*schemes.COMPARED, *schemes.SIZES)]


def table(path: Path) -> dict[str, list[str]]:
    with path.open(newline="") as file:
        return {row[0]: row[1:] for row in csv.reader(file)}


def test_weights_and_rows(model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, output = model_dir("llama"), tmp_path / "report"
    data = tiny.write_rows(tmp_path / "rows", tiny.texts(12))
    words = ["report", str(base), "--data", data, "--recipe", "sft", "--output_dir", str(output)]
    assert main(words) == 0
    printed, found = capsys.readouterr().out, table(output / "report.csv")
    assert list(found) == ["scheme", PLAIN, *SCHEMES]
    assert all(name in printed for name in SCHEMES)
    assert "after 1, " in printed
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    # The errors are those of what is loaded for training.
    cpu = torch.device("cpu")
    packed = load_base(str(base), quantization=plain_trl.nf4(), dtype=torch.float32, device=cpu).dequantize()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layers = table(output / "layers.csv")
    squares = [0.0, 0.0]
    for name, weight in plain.named_parameters():
        difference = (packed.get_parameter(name) - weight).norm()
        assert (name in layers) == (difference > 0)
        if name in layers:
            assert float(layers[name][1 + SCHEMES.index(schemes.NF4.name)]) == pytest.approx(
                (difference / weight.norm()).item(), rel=1e-4
            )
            squares = [squares[0] + difference.item() ** 2, squares[1] + weight.norm().item() ** 2]
    assert float(found[schemes.NF4.name][2]) == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
    # The losses are those of the models, and the first is its own comparison.
    assert loss(plain, data) == pytest.approx(float(found[PLAIN][3]), abs=1e-5)
    assert loss(packed, data) == pytest.approx(float(found[schemes.NF4.name][3]), abs=1e-5)
    assert [float(value) for value in found[PLAIN][5:]] == [0.0, 0.0]
    more = float(found[schemes.NF4.name][5])
    assert more == pytest.approx(float(found[schemes.NF4.name][3]) - float(found[PLAIN][3]), abs=1e-6)
    assert 0 < float(found[schemes.NF4.name][6]) < float(found[schemes.NF4.name][4])


@torch.no_grad()
def loss(model: torch.nn.Module, data: str) -> float:
    """Nats a token on the held-out texts, each with its end token."""
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    total = tokens = 0.0
    for row in tiny.texts(12)[-4:]:
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        total += model.eval()(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return total / tokens


def test_weights_alone(model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(model_dir("qwen3")), "--output_dir", str(tmp_path / "report")]) == 0
    found = table(tmp_path / "report" / "report.csv")
    assert list(found) == ["scheme", *SCHEMES]
    assert found["scheme"] == ["bits by formula", "bits by bytes", "relative error"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["no/such-model"], "no/such-model"),
        (["BASE", "--data", "ROWS"], "--recipe: nothing says which recipe reads these rows"),
        (["BASE", "--data", "no-rows.jsonl", "--recipe", "sft"], "no-rows.jsonl"),
        (["BASE", "--recipes", "sft"], "did you mean --recipe"),
    ],
    ids=["model", "recipe", "rows", "option"],
)
def test_what_is_refused(
    model_dir: ModelDir, tmp_path: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"BASE": str(model_dir("llama")), "ROWS": str(tmp_path)}
    given = [places.get(word, word) for word in words]
    assert main(["report", *given, "--output_dir", str(tmp_path / "report")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
