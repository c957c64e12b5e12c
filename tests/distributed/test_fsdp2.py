"""FSDP2 for 4-bit models: what is sharded, what is refused, and what is bitwise the same after a resume."""

import gc
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.accelerator
import bitsandbytes as bnb
import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from halfbyte import QLoRAPlugin
from halfbyte.distributed import fsdp2
from halfbyte.distributed.sharded_weights import base_bytes, packed_bytes
from halfbyte.errors import UserError
from halfbyte.trainer.invariants import replicated
from tests import packages, tiny
from tests.distributed import fake_ranks, sharded
from tests.distributed.optimizers import ENTRY_POINTS

ModelDir = Callable[..., Path]


def load(model_dir: ModelDir, arch: str = "llama") -> Any:
    return QLoRAPlugin(dtype="float32", lora_r=4).load(str(model_dir(arch)))


def live_packed_bytes() -> int:
    """Bytes of every uint8 matrix that is still referenced: packed weights, sharded or whole."""
    gc.collect()
    tensors = [
        t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter, bnb.nn.Params4bit)
    ]
    storages = [t.untyped_storage() for t in tensors if t.dtype == torch.uint8 and t.dim() == 2]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# What is sharded.


@pytest.mark.parametrize(
    ("arch", "world_size"),
    [
        ("llama", 2),
        *(pytest.param(*each, marks=pytest.mark.distributed) for each in (("qwen3", 3), ("opt", 5))),
    ],
)
def test_the_base_is_sharded(model_dir: ModelDir, arch: str, world_size: int) -> None:
    before = live_packed_bytes()
    model = load(model_dir, arch)
    whole_base, (whole, _) = base_bytes(model), packed_bytes(model)
    assert live_packed_bytes() - before == whole
    held = []
    for rank in range(world_size):
        with fake_ranks.rank_of(world_size, rank) as mesh:
            model = load(model_dir, arch)
            fsdp2.prepare(fake_ranks.accelerator(mesh), model)
            assert isinstance(model, FSDPModule)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            assert trainable
            assert {parameter.dtype for parameter in trainable} == {torch.float32}
            assert (
                live_packed_bytes() - before <= whole // world_size + len(fsdp2._linears(model)) * world_size
            )
            held.append((*packed_bytes(model), base_bytes(model)))
    assert sum(here for here, _, _ in held) == whole
    assert {total for _, total, _ in held} == {whole}
    assert replicated([(here, total) for here, total, _ in held]) is None
    assert all(base < whole_base for _, _, base in held)


def test_a_replicated_base_is_an_error() -> None:
    assert replicated([(100, 100)]) is None
    assert replicated([(50, 100), (50, 100)]) is None
    problem = replicated([(50, 100), (100, 100)])
    assert problem is not None
    assert "rank 1 holds 100 of the 100 bytes" in problem


def test_accelerate_still_replicates_a_4_bit_base(model_dir: ModelDir) -> None:
    """When this fails, accelerate shards uint8 weights by itself: remove `fsdp2.prepare`, or what it repeats."""
    model = load(model_dir)
    with fake_ranks.rank_of(2) as mesh, warnings.catch_warnings(record=True):
        fsdp2._stock_prepare(fake_ranks.accelerator(mesh), model)
        assert not isinstance(next(iter(fsdp2._linears(model).values())).weight, DTensor)


def test_accelerate_calls_what_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fsdp2_prepare_model(self, model)" in inspect.getsource(accelerate.Accelerator._prepare_fsdp2)
    monkeypatch.setattr(accelerate.accelerator, "fsdp2_prepare_model", fsdp2._stock_prepare)
    fsdp2.install()
    assert accelerate.accelerator.fsdp2_prepare_model is fsdp2.prepare


def test_other_models_go_accelerates_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(fsdp2, "_stock_prepare", lambda accelerator, model: seen.append(model) or model)
    model = torch.nn.Linear(2, 2)
    assert fsdp2.prepare(None, model) is model
    assert seen == [model]


# What is refused.


@pytest.mark.distributed
def test_the_bare_cpu_launch_is_refused(tmp_path: Path) -> None:
    """accelerate would train with DDP here, without a warning."""
    rows = tiny.write_rows(tmp_path / "rows", tiny.texts(8))
    words = (
        "sft",
        "--model_name_or_path",
        "none",
        "--dataset_name",
        rows,
        "--output_dir",
        str(tmp_path / "run"),
    )
    done = sharded.start("fsdp2", 2, *words, shim=False)
    assert done.returncode != 0
    assert done.stderr.count("FSDP2 was requested, but the run is using DDP") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("integers", "given", "compute", "expected"),
    [
        (True, None, torch.bfloat16, None),
        (True, "uint8", torch.bfloat16, "uint8"),
        (True, "bfloat16", torch.bfloat16, "bfloat16"),
        (True, "float16", torch.bfloat16, UserError),
        (True, "float32", torch.bfloat16, UserError),
        (False, None, torch.bfloat16, "bfloat16"),
        (False, "float32", torch.float32, "float32"),
        (False, "uint8", torch.bfloat16, UserError),
    ],
)
def test_packed_weights_are_stored_as_what_is_sharded_and_never_cast(
    monkeypatch: pytest.MonkeyPatch, integers: bool, given: str | None, compute: torch.dtype, expected: Any
) -> None:
    monkeypatch.setattr(fsdp2, "shards_integers", lambda: integers)
    if expected is UserError:
        with pytest.raises(UserError, match="bnb_4bit_quant_storage: ") as error:
            fsdp2.quantization_storage(given, compute)
        assert error.value.option == "bnb_4bit_quant_storage"
        return
    storage, line = fsdp2.quantization_storage(given, compute)
    assert storage == expected
    assert (line is not None) == (not integers and given is None)


def test_a_base_whose_storage_would_be_cast_is_refused() -> None:
    linear = bnb.nn.Linear4bit(4, 4, compute_dtype=torch.bfloat16, quant_storage=torch.bfloat16)
    linear.weight.data = linear.weight.data.bfloat16()
    model = torch.nn.Sequential(linear)
    fsdp2.check_base(model, torch.bfloat16)
    with pytest.raises(UserError, match="stored as bfloat16 and the run computes in float32"):
        fsdp2.check_base(model, torch.float32)


def test_which_torch_shards_integers() -> None:
    assert [fsdp2.shards_integers(v) for v in ("2.11.0", "2.12.1+cpu", "2.13.0+cpu", "3.0.0")] == [
        False,
        False,
        True,
        True,
    ]


# A whole run beside those of test_sharded_matrix.py.


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("optimizer", "processes"), [("adamw_torch", 3), ("paged_adamw_32bit", 2), ("lion_32bit", 3)]
)
def test_a_resumed_run_is_bitwise_the_whole_one(
    tmp_path: Path, model_dir: ModelDir, optimizer: str, processes: int
) -> None:
    """With dropout; the bitsandbytes optimizers in a recipe of their own, since off CUDA halfbyte trains without."""
    site = packages.write(tmp_path / "site", "sharded", ENTRY_POINTS)
    options = {
        "model_name_or_path": str(model_dir("llama")),
        "lora_dropout": 0.1,
        "save_strategy": "steps",
        "save_steps": 3,
        "bitsandbytes_optimizer": optimizer if optimizer != "adamw_torch" else None,
    }
    recipe = "sharded-sft"
    runs = []
    for name in ("whole", "resumed"):
        (root := tmp_path / name).mkdir()
        if runs:
            options |= sharded.resumed(root, runs[0], 3)
        runs.append(sharded.train(root, recipe, "fsdp2", processes, options, PYTHONPATH=str(site)))
    sharded.assert_resumed(*runs)
