"""One process that is a rank of many: collectives do nothing, which shows how tensors are sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def rank_of(world_size: int, rank: int = 0) -> Iterator[DeviceMesh]:
    """A mesh of ``world_size`` CPU ranks, seen from ``rank``."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,), mesh_dim_names=("fsdp",))
    finally:
        dist.destroy_process_group()


def accelerator(mesh: DeviceMesh, *optimizers: Any) -> Any:
    """What accelerate hands to ``fsdp2_prepare_model``, as launch/fsdp2.yaml sets it up."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=["fsdp"]),
        mixed_precision="no",
        is_main_process=True,
        _optimizers=[SimpleNamespace(optimizer=optimizer) for optimizer in optimizers],
    )
