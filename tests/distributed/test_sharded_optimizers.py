"""bitsandbytes optimizers on sharded parameters: every rank's shard moves as that part of the whole does."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from halfbyte.distributed.sharded_optimizers import check_optimizer, step_on_shards
from halfbyte.errors import UserError
from tests.distributed import fake_ranks

ROWS, COLUMNS = 5, 3  # uneven on two ranks; a rank of eight may have nothing
OPTIMIZERS = {
    "adamw": lambda p: bnb.optim.AdamW(p, lr=1e-2, optim_bits=32),
    "paged adamw": lambda p: bnb.optim.PagedAdamW32bit(p, lr=1e-2),
    "lion": lambda p: bnb.optim.Lion32bit(p, lr=1e-2),
    "torch": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


def whole(optimizer: str, gradients: list[torch.Tensor]) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.ones(ROWS, COLUMNS))
    made = OPTIMIZERS[optimizer]([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        made.step()
    return parameter.detach()


def sharded(mesh: Any, tensor: torch.Tensor, rank: int) -> DTensor:
    chunks = tensor.chunk(mesh.size())
    local = chunks[rank] if rank < len(chunks) else tensor[:0]
    return DTensor.from_local(
        local.clone(), mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_shard_moves_as_that_part_of_the_whole(optimizer: str, world_size: int) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(ROWS, COLUMNS) for _ in range(3)]
    expected = whole(optimizer, gradients)
    shards = []
    for rank in range(world_size):
        with fake_ranks.rank_of(world_size, rank) as mesh:
            parameter = torch.nn.Parameter(sharded(mesh, torch.ones(ROWS, COLUMNS), rank))
            made = OPTIMIZERS[optimizer]([parameter])
            step_on_shards(made)
            step_on_shards(made)  # as often as the model is prepared
            for gradient in gradients:
                parameter.grad = sharded(mesh, gradient, rank)
                made.step()
            shards.append(parameter.detach().to_local())
            states = [v for v in made.state[parameter].values() if getattr(v, "dim", lambda: 0)()]
            assert states
            assert all(isinstance(state, DTensor) and state.shape == (ROWS, COLUMNS) for state in states)
            assert int(made.state[parameter]["step"]) == 3
            saved = made.state_dict()["state"][0]
            assert not any(isinstance(value, dict) for value in saved.values()), "hidden from checkpoints"
    assert torch.equal(torch.cat(shards), expected)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "lion_32bit"])
def test_32_bit_optimizers_are_allowed(optim: str) -> None:
    check_optimizer(optim)


@pytest.mark.parametrize(
    ("optim", "instead"),
    [
        ("paged_adamw_8bit", "optim: paged_adamw_32bit"),
        ("adamw_8bit", "optim: paged_adamw_32bit"),
        ("adamw_bnb_8bit", "optim: paged_adamw_32bit"),
        ("lion_8bit", "optim: lion_32bit"),
        ("paged_ademamix_8bit", "optim: paged_adamw_32bit"),
        ("ademamix", "optim: paged_adamw_32bit"),
        ("adamw_torch_8bit", "optim: adamw_torch"),
        ("galore_adamw_8bit_layerwise", "optim: adamw_torch"),
    ],
)
def test_others_are_refused_with_the_alternative(optim: str, instead: str) -> None:
    with pytest.raises(UserError, match=f"optim: {optim}: ") as error:
        check_optimizer(optim)
    assert error.value.option == "optim"
    assert instead in str(error.value)


@pytest.mark.parametrize("cls", [bnb.optim.AdamW8bit, bnb.optim.AdEMAMix])
def test_an_optimizer_of_ones_own_is_refused_too(cls: type) -> None:
    with pytest.raises(UserError, match=cls.__name__):
        step_on_shards(cls([torch.nn.Parameter(torch.ones(2))]))
