"""`halfbyte plot`: one picture of several runs, or one run's own plots again."""

from pathlib import Path

import pytest

from halfbyte.cli import main
from tests.tracking.written import write_run


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a", "b"):
        write_run(tmp_path / "sweep" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_several_runs_are_one_picture(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "sweep"]) == 0
    assert capsys.readouterr().out == "written: halfbyte-plot.png\n"
    assert (sweep / "halfbyte-plot.png").read_bytes().startswith(b"\x89PNG")
    assert (
        main(["plot", "sweep/a", "sweep/b", "--metric", "loss", "--output", "out/x.svg", "--smooth", "0"])
        == 0
    )
    assert capsys.readouterr().out == "written: out/x.svg\n"
    assert b"<svg" in (sweep / "out" / "x.svg").read_bytes()
    assert [path.name for path in (sweep / "out").iterdir()] == ["x.svg"]


def test_one_run_is_drawn_again(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "sweep/a"]) == 0
    written = sweep / "sweep" / "a" / "plots" / "loss.png"
    assert capsys.readouterr().out == f"written: {written}\n"
    assert written.read_bytes().startswith(b"\x89PNG")
    assert not (sweep / "halfbyte-plot.png").exists()
    assert main(["plot", "sweep/a", "--dark"]) == 0
    assert capsys.readouterr().out == "written: halfbyte-plot.png\n"


REFUSED = {
    "--output x.pdf": "--output: x.pdf must end in .png or .svg",
    "--smooth 1": "--smooth: 1.0 must be at least 0 and below 1",
    "--smooth=-1": "--smooth: -1.0 must be at least 0 and below 1",
    "--smooth nan": "--smooth: nan must be at least 0 and below 1",
    "--metric los": "--metric: no run has a figure 'los'; did you mean loss?",
    "--output sweep/a/run.json/x.png": "cannot write: ",
}


@pytest.mark.parametrize("options", REFUSED)
def test_refused(sweep: Path, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(sweep.rglob("*"))
    assert main(["plot", "sweep", *options.split()]) == 2
    assert REFUSED[options] in capsys.readouterr().err
    assert sorted(sweep.rglob("*")) == before
