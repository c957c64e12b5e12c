"""References are computed by all ranks and are the same on any number of them, under every strategy."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.trainer import reference_shard
from tests import launch
from tests.distributed import preferences, sharded

pytestmark = pytest.mark.distributed
ModelDir = Callable[..., Path]
LN2 = math.log(2)


def test_two_processes_share_a_pass_over_rows_in_memory(tmp_path: Path, model_dir: ModelDir) -> None:
    """Killed in its middle it continues at its shard; one process then reads what two have computed."""

    def run(processes: int, *killed: str, cache: str) -> dict[str, Any] | None:
        arguments = (str(model_dir("llama")), str(tmp_path / "run"), *killed)
        module = "tests.distributed.preferences"
        done = (
            launch.accelerate(*arguments, module=module, processes=processes, XDG_CACHE_HOME=cache)
            if processes > 1
            else launch.python(module, *arguments, XDG_CACHE_HOME=cache)
        )
        told = [line.removeprefix("told ") for line in done.stdout.splitlines() if line.startswith("told ")]
        assert bool(told) != bool(killed), done.stderr[-4000:]
        return json.loads(told[0]) if told else None

    cache = tmp_path / "cache"
    assert run(2, reference_shard.name(2), cache=str(cache)) is None
    written = list((cache / "halfbyte" / "references").glob("*/*.safetensors"))
    assert len(written) == 2
    two = run(2, cache=str(cache))
    assert two is not None
    # Batches of 2: three of each of two shards and one of the last, then one of the evaluation set.
    assert [len(forwards) for forwards in two["forwards"]] == [2 + 2 + 1 + 1] * 2
    assert [len(forwards) for forwards in two["later"]] == [1, 1]
    assert two["losses"][0] == pytest.approx(LN2, abs=1e-6)
    one = run(1, cache=str(cache))
    assert one is not None
    assert one["forwards"] == [[]]
    assert one["chosen"] == two["chosen"]
    other = run(1, cache=str(tmp_path / "another"))
    assert other is not None
    assert sum(other["forwards"][0]) == preferences.PAIRS + 3
    assert other["chosen"] == two["chosen"], "a batch has the same rows on any number of processes"
    assert other["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_an_evaluation_set_that_comes_later_is_computed_by_the_sharded_model(
    tmp_path: Path, model_dir: ModelDir, strategy: str
) -> None:
    module, words = "tests.distributed.preferences", (str(model_dir("llama")), str(tmp_path / "run"))
    told = []
    for name, done in (
        (
            "sharded",
            sharded.start(strategy, 2, *words, module=module, XDG_CACHE_HOME=str(tmp_path / "sharded")),
        ),
        ("whole", launch.accelerate(*words, module=module, XDG_CACHE_HOME=str(tmp_path / "whole"))),
    ):
        lines = [line for line in done.stdout.splitlines() if line.startswith("told ")]
        assert lines, (name, done.stderr[-4000:])
        told.append(json.loads(lines[0].removeprefix("told ")))
    assert told[0]["forwards"] == told[1]["forwards"]
    assert told[0]["later"] == told[1]["later"]
    assert told[0]["chosen"] == pytest.approx(told[1]["chosen"], rel=1e-6)
    assert told[0]["losses"] == pytest.approx(told[1]["losses"], abs=1e-5)
    assert told[0]["eval_loss"] == pytest.approx(told[1]["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(("strategy", "processes"), [("fsdp2", 2), ("zero3", 2)])
def test_a_sharded_base_computes_them_ahead_as_a_whole_one_does_beside(
    tmp_path: Path, model_dir: ModelDir, strategy: str, processes: int
) -> None:
    runs = []
    for name, count, ahead in (
        ("whole", 1, "false"),
        ("sharded", processes, "true"),
        ("again", processes, "true"),
    ):
        (root := tmp_path / name).mkdir()
        options = {"model_name_or_path": str(model_dir("llama")), "precompute_ref_log_probs": ahead}
        if name == "again":
            options |= {"seed": 3, "lora_r": 4}
        cache = str(tmp_path / "cache")
        runs.append(sharded.train(root, "dpo", strategy, count, options, XDG_CACHE_HOME=cache))
    whole, ahead_of, again = runs
    sharded.assert_equal(whole, ahead_of)
    assert ahead_of.logged()[0] == pytest.approx(LN2, abs=1e-6)
    assert again.logged()[0] == pytest.approx(LN2, abs=1e-6)
    entries = [path for path in (tmp_path / "cache" / "halfbyte" / "references").iterdir() if path.is_dir()]
    assert len(entries) == 2, "one of the training rows and one of the held-out ones"
