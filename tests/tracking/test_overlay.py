"""Several runs in one picture: what is drawn, in which colours, named where, and as what file."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from halfbyte.errors import UserError
from halfbyte.tracking.drawing import DARK, LIGHT, apart
from halfbyte.tracking.overlay import panels, picture
from halfbyte.tracking.runs import Run, find
from halfbyte.tracking.series import curves, smooth, usual_weight
from tests.tracking.written import write_run

NOISE = [{"step": step, "loss": 1 + (step % 7) / 7} for step in range(1, 150)]


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """One that logged much, and one of DPO."""
    write_run(tmp_path / "long $x$", rows=[*NOISE, {"step": 10, "grad_norm": 0.5}])
    write_run(tmp_path / "other", recipe="dpo", rows=[{"step": 10, "rewards/margins": 1.0}])
    return find([tmp_path]).runs


def test_unset_the_figures_that_the_recipes_compare(runs: list[Run]) -> None:
    found, missing = panels(runs, [])
    assert [(panel.plot.title, list(panel.of)) for panel in found] == [("Loss", ["long $x$", "other"])]
    assert missing == []


def test_figures_by_name_and_what_lacks_them(runs: list[Run]) -> None:
    found, missing = panels(runs, ["eval_loss", "grad_norm", "rewards/margins"])
    assert [panel.plot.title for panel in found] == [
        "Loss",
        "Gradient norm, before clipping",
        "Reward margin, chosen minus rejected",
    ]
    assert {part for series in found[0].of.values() for _, part in series} == {"eval"}
    assert missing == ["grad_norm: not in other", "rewards/margins: not in long $x$"]


def test_an_unknown_figure_is_answered_with_the_nearest(runs: list[Run]) -> None:
    with pytest.raises(
        UserError, match=r"--metric: no run has a figure 'grad_nrm'; did you mean grad_norm\?\n"
    ):
        panels(runs, ["grad_nrm"])


def test_runs_without_a_row_have_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl is empty"):
        panels(find([write_run(tmp_path / "run", ())]).runs, [])


@pytest.mark.parametrize("dark", [False, True])
def test_each_run_has_its_colour_on_light_and_on_dark(runs: list[Run], dark: bool) -> None:
    found, _ = panels(runs, ["loss"])
    pixels = imread(io.BytesIO(picture(runs, found, kind="png", dark=dark, weight=None)))
    assert pixels.shape[:2] == (736, 1280)
    levels = (255 * pixels[..., :3]).round().astype(int)
    theme = DARK if dark else LIGHT
    for colour in (theme.background, *theme.colours[:2]):
        assert (levels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).any()


def test_an_svg_is_the_same_each_time(runs: list[Run]) -> None:
    found, _ = panels(runs, ["loss", "grad_norm"])
    first, second = (picture(runs, found, kind="svg", dark=False, weight=0.5) for _ in range(2))
    assert first == second
    assert b"<svg" in first
    assert all(colour.lower().encode() in first for colour in LIGHT.colours[:2])


def test_many_runs_have_as_many_colours() -> None:
    for theme in (LIGHT, DARK):
        assert theme.lines(2) == list(theme.colours[:2])
        assert len(set(theme.lines(30))) == 30


def test_names_are_moved_apart_in_their_order() -> None:
    assert apart([0.0, 5.0, 9.0], 2.0) == [0.0, 5.0, 9.0]
    assert apart([1.0, 1.0], 2.0) == [0.0, 2.0]
    moved = apart([3.0, 0.1, 0.0, 0.2], 1.0)
    assert moved == pytest.approx([3.0, 0.1, -0.9, 1.1])


def test_a_line_is_smoothed_where_it_is_and_not_behind() -> None:
    assert smooth([1.0, 5.0, 2.0], 0.0) == [1.0, 5.0, 2.0]
    line = [float(n) for n in range(50)]
    smoothed = smooth(line, 0.9)
    assert smoothed[0] == line[0]
    assert np.allclose(smoothed[:25], line[:25])  # where there is as much ahead as behind
    assert smooth([2.0] * 9, 0.95) == pytest.approx([2.0] * 9)
    assert usual_weight([(1, 1.0)] * 100) == 0.0
    assert 0 < usual_weight([(1, 1.0)] * 101) < usual_weight([(1, 1.0)] * 9000) == 0.95


def test_what_is_no_finite_number_is_no_point() -> None:
    rows = [
        {"step": n, "loss": value} for n, value in enumerate((1.0, float("nan"), True, 10**400, "2", None))
    ]
    assert curves(rows, ["loss"]) == {("loss", "train"): [(0, 1.0)]}
