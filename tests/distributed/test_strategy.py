"""The strategy in use is compared with the requested one, and every refusal says what to write."""

import importlib.util
from pathlib import Path

import pytest

from halfbyte.distributed import strategy as strategies
from halfbyte.distributed import support, zero3
from halfbyte.distributed.launcher import Request
from halfbyte.distributed.strategy import (
    Strategy,
    difference,
    refuse_precision,
    refuse_unsupported,
    strategy_in_use,
)
from halfbyte.errors import UserError

ROOT = Path(__file__).parents[2]
ONE, TWO = Strategy("single", 1, "cpu"), Strategy("ddp", 2, "cpu")


@pytest.mark.parametrize(
    ("request_", "in_use", "words"),
    [
        (Request("ddp", 2, launcher="accelerate", use_cpu=True), ONE, "2 processes were requested, but this one"),
        (Request("ddp", 2, launcher="torchrun"), ONE, "started 2 processes, but 1 train together"),
        (Request("ddp", 4, launcher="torchrun"), TWO, "started 4 processes, but 2 train together"),
        (Request("ddp", 2, launcher="srun"), ONE, "srun started 2 tasks"),
        (Request("fsdp2", 2), TWO, "FSDP2 was requested, but the run is using DDP"),
        (Request("zero3", 1), ONE, "ZeRO-3 was requested, but the run is using one process"),
        (Request("ddp", 2, use_cpu=False, launcher="accelerate"), TWO, "this machine has no visible GPU"),
    ],
)  # fmt: skip
def test_a_difference_is_named_with_what_to_write(request_: Request, in_use: Strategy, words: str) -> None:
    problem = difference(request_, in_use, cpu_requested=False)
    assert problem is not None
    assert words in problem
    assert "launch/" in problem
    assert len(problem.splitlines()) <= 10


@pytest.mark.parametrize(
    ("request_", "in_use"),
    [
        (Request(), ONE),
        (Request("ddp", 1, launcher="torchrun"), ONE),
        (Request("ddp", 2, use_cpu=True, launcher="accelerate"), TWO),
        (Request("ddp", 2, launcher="torchrun"), TWO),
        (Request("ddp", 2, use_cpu=False, launcher="accelerate"), Strategy("ddp", 2, "NVIDIA H200")),
        (Request("fsdp2", 2, use_cpu=False), Strategy("fsdp2", 2, "NVIDIA H200")),
        (Request("single", 1, use_cpu=False, launcher="accelerate"), ONE),
    ],
)
def test_what_was_requested_runs(request_: Request, in_use: Strategy) -> None:
    assert difference(request_, in_use, cpu_requested=False) is None


def test_cpus_are_accepted_when_the_run_requests_them() -> None:
    assert (
        difference(Request("ddp", 2, use_cpu=False, launcher="accelerate"), TWO, cpu_requested=True) is None
    )


def test_several_machines_get_their_own_file() -> None:
    problem = difference(Request("ddp", 2, machines=2, launcher="accelerate"), ONE, cpu_requested=False)
    assert problem is not None
    assert "launch/multi_node.yaml" in problem


def test_two_unsynchronised_trainers_are_stopped() -> None:
    with pytest.raises(UserError, match="started 2 processes, but 1 train together"):
        strategy_in_use(environment={"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("launched", "dtype", "fits"),
    [
        ("no", "float32", True),
        ("bf16", "bfloat16", True),
        ("bf16", "float32", False),
        ("fp8", "bfloat16", False),
    ],
)
def test_the_launchers_precision_is_the_runs(launched: str, dtype: str, fits: bool) -> None:
    environment = {"ACCELERATE_MIXED_PRECISION": launched}
    if fits:
        refuse_precision(dtype, "as given", environment)
    else:
        with pytest.raises(UserError, match=f"mixed_precision {launched}.*{dtype}"):
            refuse_precision(dtype, "as given", environment)


LAUNCHED = {
    "fsdp1": {"ACCELERATE_USE_FSDP": "true"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "deepspeed_file": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "auto.json",
    },
    "megatron": {"ACCELERATE_USE_MEGATRON_LM": "true"},
    "parallelism": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
    "other": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
}


@pytest.mark.parametrize("strategy", LAUNCHED)
def test_a_launch_runs_or_is_refused_as_the_table_says(strategy: str) -> None:
    row = support.find(strategy)
    if strategy == "zero3" and importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(UserError, match=r"not installed: pip install 'halfbyte\[deepspeed\]'"):
            refuse_unsupported(LAUNCHED[strategy])
    elif row.supported:
        refuse_unsupported(LAUNCHED[strategy])
    else:
        with pytest.raises(UserError) as caught:
            refuse_unsupported(LAUNCHED[strategy])
        assert row.reason in str(caught.value)
        assert "launch/" in str(caught.value)


def test_every_refused_strategy_is_launched_here() -> None:
    refused = {name for name in support.STRATEGIES if not support.find(name).supported}
    assert refused <= {*LAUNCHED, "data_parallel"}, "no launcher requests the last: below"


def test_one_process_that_sees_several_gpus_is_refused() -> None:
    strategies._require_one_gpu(1)
    with pytest.raises(
        UserError, match=r"sees 8 GPUs.*replicas of a 4-bit base.*launch/ddp\.yaml --num_processes 8"
    ):
        strategies._require_one_gpu(8)


def test_only_bases_in_4_bits_are_sharded() -> None:
    strategies.check_quantized("fsdp2", load_in_4bit=True)
    with pytest.raises(UserError, match=r"load_in_4bit: false under fsdp2.*launch/ddp\.yaml"):
        strategies.check_quantized("fsdp2", load_in_4bit=False)


@pytest.mark.parametrize("option", support.OPTIONS, ids=lambda o: o.name)
def test_every_refused_option_has_its_message(
    option: support.Option, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero3.importlib.util, "find_spec", lambda name: object())
    requested = LAUNCHED[option.strategy]
    refuse_unsupported({**requested, option.variable: option.instead if option.instead != "null" else "None"})
    with pytest.raises(
        UserError, match=rf"{option.name}: .*write `{option.name}: {option.instead}`"
    ) as caught:
        refuse_unsupported({**requested, option.variable: "true"})
    assert option.reason in str(caught.value)
    assert (ROOT / "launch" / f"{option.strategy}.yaml").is_file()
    assert support.refused_option(option.strategy, {option.name: True}) is not None, "as a launch file has it"


@pytest.mark.parametrize("row", support.TABLE, ids=lambda r: f"{r.strategy}-{r.storage}-{r.optimizer}")
def test_every_row_decides_for_its_own_combination(row: support.Combination) -> None:
    storage = "uint8" if row.storage == support.ANY else row.storage
    optimizer = "32-bit" if row.optimizer == support.ANY else row.optimizer
    found = support.find(row.strategy, storage, optimizer)
    assert found == row
    if row.supported:
        support.require(row.strategy, storage, optimizer)
    else:
        assert row.instead
        with pytest.raises(UserError, match=r"which is refused: .*; instead: "):
            support.require(row.strategy, storage, optimizer)


def test_readme_holds_the_table() -> None:
    readme = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
    assert support.markdown() in readme, "put this into README.md:\n" + support.markdown()
