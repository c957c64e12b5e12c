"""FSDP2 for 4-bit models: the packed weights are sharded over the ranks, and gathered one layer at a time.

accelerate 1.15 (utils/fsdp_utils.py, ``fsdp2_prepare_model``) replicates 4-bit weights in uint8 storage on every
rank, with a warning. torch shards parameters of any dtype from 2.13 on
(torch/distributed/fsdp/_fully_shard/_fsdp_param.py); before that only floating-point ones.
"""

import os
from collections.abc import Mapping
from typing import Any

import accelerate.accelerator
import bitsandbytes as bnb
import torch
from accelerate.utils import fsdp_utils
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList

from halfbyte.distributed.launcher import is_on
from halfbyte.distributed.sharded_optimizers import step_on_shards
from halfbyte.errors import UserError

# The first torch whose FSDP2 shards parameters that are not floating-point.
SHARDS_INTEGERS = (2, 13)

_stock_prepare = accelerate.accelerator.fsdp2_prepare_model


def requested() -> bool:
    """Whether the launcher requested FSDP, of either version."""
    return is_on(os.environ, "ACCELERATE_USE_FSDP")


def quantization_storage(given: str | None, compute_dtype: torch.dtype) -> tuple[str | None, str | None]:
    """Return the dtype to store packed 4-bit weights in under FSDP2, and the line to print where it is not the default.

    None stands for bitsandbytes' default, uint8; below torch 2.13 it is the compute dtype. ``given`` is the user's
    choice.

    Raises :class:`UserError` if ``given`` cannot be sharded, or would be cast, which corrupts packed bytes.
    """
    wanted = str(compute_dtype).removeprefix("torch.")
    if given is None and not shards_integers():
        return wanted, (
            f"bnb_4bit_quant_storage: torch {torch.__version__} shards floating-point weights only, so the packed "
            f"4-bit weights are stored as {wanted}; from torch 2.13 on they stay uint8"
        )
    _check_storage(given or "uint8", wanted)
    return given, None


def check_base(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Raise :class:`UserError` if the storage of a loaded base, fixed by its checkpoint, is wrong under FSDP2."""
    for linear in _linears(model).values():
        _check_storage(*(str(dtype).removeprefix("torch.") for dtype in (linear.weight.dtype, compute_dtype)))


def shards_integers(version: str = torch.__version__) -> bool:
    """Whether this torch's FSDP2 shards parameters that are not floating-point."""
    return tuple(int(part) for part in version.split(".")[:2]) >= SHARDS_INTEGERS


def install() -> None:
    """Have accelerate shard 4-bit models with :func:`prepare`; a process-wide patch. Other models are unaffected."""
    accelerate.accelerator.fsdp2_prepare_model = prepare


def prepare(accelerator: Any, model: nn.Module) -> nn.Module:
    """Shard ``model`` over the ranks in place, its packed 4-bit weights included, and return it.

    Replaces ``accelerate.accelerator.fsdp2_prepare_model``. Parameters keep their dtype and gradients are reduced in
    float32, so that a step equals that of one process; accelerate would reduce the gradients of float32 adapters,
    and round the loss, in the compute dtype.
    """
    linears = _linears(model)
    if not linears or isinstance(model, FSDPModule):
        return _stock_prepare(accelerator, model)
    for name, linear in linears.items():
        _unwrap_packed(name, linear)
    packed = stacks(model)
    for stack in packed.values():
        # What reads it has the state.
        stack.original = nn.Parameter(stack.original.detach().as_subclass(torch.Tensor), requires_grad=False)
    plugin = accelerator.state.fsdp_plugin
    plugin.set_auto_wrap_policy(model)
    mesh = getattr(accelerator, "torch_device_mesh", None)
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "mesh": mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)] if mesh is not None else None,
    }
    is_layer = fsdp_utils.fsdp2_prepare_auto_wrap_policy(plugin, model)
    if is_layer is not None:
        for module in fsdp_utils.get_module_children_bottom_up(model)[:-1]:
            if is_layer(module) and not isinstance(module, FSDPModule):
                fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, **options)
    # Embeddings and head stay with the root, gathered for the whole forward: TRL's fused losses read the head's
    # weight without calling the head, and tied ones must be in one group.
    fully_shard(model, **options)
    if hasattr(model, "generate"):  # which runs modules below the root, and not the root itself
        register_fsdp_forward_method(model, "generate")
    _check_sharded({name: linear.get_parameter("weight") for name, linear in linears.items()})
    _check_sharded({name: stack.original for name, stack in packed.items()})
    for optimizer in accelerator._optimizers:
        step_on_shards(optimizer.optimizer)
    return model


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def stacks(model: nn.Module) -> dict[str, Any]:
    """Return the packed experts of ``model``, which bitsandbytes dequantizes as they are read."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ParametrizationList) and isinstance(module[0], Bnb4bitParametrization)
    }


def _unwrap_packed(name: str, linear: Any) -> None:
    """Make the packed weight ``[F * H / 2, 1]`` a plain parameter; each forward restores it from ``quant_state``."""
    weight = linear.weight
    state = getattr(weight, "quant_state", None)
    assert state is not None, f"{name}: the 4-bit weight is not quantized yet"
    assert not getattr(state, "packing_format_for_cpu", False), (
        f"{name}: the weight was repacked for inference"
    )
    linear.quant_state = state
    linear.weight = nn.Parameter(weight.detach().as_subclass(torch.Tensor), requires_grad=False)


def _check_sharded(packed: Mapping[str, torch.Tensor]) -> None:
    whole = [name for name, weight in packed.items() if not isinstance(weight, DTensor)]
    assert not whole, f"FSDP2 did not shard {len(whole)} 4-bit weights, the first {whole[0]}"


def _check_storage(storage: str, compute_dtype: str) -> None:
    is_float = getattr(torch, storage).is_floating_point
    if is_float and storage != compute_dtype:
        raise UserError(
            f"the packed 4-bit weights are stored as {storage} and the run computes in {compute_dtype}; under FSDP2 a "
            f"cast between the two would corrupt the packed bytes. Write "
            f"`bnb_4bit_quant_storage: {'uint8' if shards_integers() else compute_dtype}` and load the 16-bit "
            f"checkpoint, or `dtype: {storage}`",
            option="bnb_4bit_quant_storage",
        )
    if not is_float and not shards_integers():
        raise UserError(
            f"torch {torch.__version__} does not shard {storage} weights: every rank would hold the whole base; write "
            f"`bnb_4bit_quant_storage: {compute_dtype}` and load the 16-bit checkpoint, or use torch 2.13",
            option="bnb_4bit_quant_storage",
        )
