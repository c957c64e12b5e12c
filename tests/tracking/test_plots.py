import math
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from halfbyte.tracking.plots import draw
from halfbyte.tracking.series import curves


def _rows(steps: int) -> list[dict]:
    rows: list[dict] = []
    for step in range(0, steps + 1, 10):
        share = step / steps
        if step % 50 == 0:
            rows.append(
                {
                    "step": step,
                    "eval_loss": 0.7 - 0.3 * share,
                    "eval_rewards/accuracies": 0.5 + 0.4 * share,
                    "eval_rewards/margins": 2 * share,
                    "eval_rewards/chosen": share,
                    "eval_rewards/rejected": -share,
                }
            )
        if step:
            rows.append(
                {
                    "step": step,
                    "loss": 0.7 - 0.3 * share + 0.05 * math.sin(step),
                    "grad_norm": 1 + 0.3 * math.cos(step),
                    "learning_rate": 2e-4 * (1 - share),
                    "rewards/accuracies": 0.5 + 0.4 * share + 0.1 * math.sin(step),
                    "rewards/margins": 2 * share + 0.3 * math.sin(step),
                    "rewards/chosen": share + 0.1 * math.sin(step),
                    "rewards/rejected": -share + 0.1 * math.cos(step),
                }
            )
    return rows


def test_every_plot_that_has_figures_is_drawn(tmp_path: Path) -> None:
    written = draw(_rows(200), tmp_path / "plots", "dpo")
    names = ["loss", "learning_rate", "grad_norm", "accuracy", "margin", "rewards"]
    assert [path.name for path in written] == [f"{name}.png" for name in names]
    for path in written:
        picture = imread(path)
        assert picture.shape[:2] == (630, 1050)
        assert np.ptp(picture[..., :3]) > 0.9


def test_a_long_run_is_smoothed_and_nulls_are_left_out(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": None if step == 7 else 1 / step} for step in range(1, 500)]
    assert [path.name for path in draw(rows, tmp_path, "sft")] == ["loss.png"]


def test_what_is_drawn_already_is_left(tmp_path: Path) -> None:
    rows, drawn = _rows(100), {}
    before = {path: path.stat().st_mtime_ns for path in draw(rows, tmp_path, "dpo", drawn)}
    (tmp_path / "margin.png").unlink()
    rows.append({"step": 110, "loss": 0.1})
    after = {path: path.stat().st_mtime_ns for path in draw(rows, tmp_path, "dpo", drawn)}
    assert after.keys() == before.keys()
    assert {path.name for path in after if after[path] != before[path]} == {"loss.png", "margin.png"}


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert draw([], tmp_path / "plots", "sft") == []
    assert not (tmp_path / "plots").exists()


def test_series_join_a_resumed_run_and_name_the_data_sets() -> None:
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "loss": 1.0, "eval_x_loss": 9.0},
        {"step": 2, "eval_loss": 5.0},
    ]
    assert curves(rows, ["loss"]) == {
        ("loss", "train"): [(1, 3.0), (2, 1.0)],
        ("loss", "eval x"): [(2, 9.0)],
        ("loss", "eval"): [(2, 5.0)],
    }
