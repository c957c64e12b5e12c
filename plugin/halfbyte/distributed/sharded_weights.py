"""Weights of a sharded model: which adapters are supported, gathered for saving, measured for the record."""

from collections.abc import Collection
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn

from halfbyte.distributed import fsdp2, zero3
from halfbyte.distributed.shards import is_sharded, local_shard, whole
from halfbyte.errors import UserError


def check_adapters(*, rows: bool, dora: bool) -> None:
    """Raise :class:`UserError` for an adapter that is not supported on a sharded base: of embedding ``rows``, ``dora``.

    Trained embedding rows crash torch 2.13 under FSDP2, with a tied or an untied head: signal 11 after a few steps,
    at a different place each time. PEFT 0.21 initializes DoRA's magnitudes from base weights, which DeepSpeed does
    not gather for it.
    """
    if rows and (fsdp2.requested() or zero3.requested()):
        raise UserError(
            "the adapter trains embedding rows, which is supported under DDP only; launch with launch/ddp.yaml",
            option="additional_special_tokens",
        )
    if dora and zero3.requested():
        raise UserError(
            "true fails under DeepSpeed (DoRA reads base weights that are not gathered); remove it, or launch "
            "with launch/fsdp2.yaml or launch/ddp.yaml",
            option="use_dora",
        )


def check_experts(stacks: Collection[str]) -> None:
    """Raise :class:`UserError` for packed ``stacks`` of experts under ZeRO-3.

    DeepSpeed gathers a module's parameters when its forward is called; stacks are read as attributes.
    """
    if stacks and zero3.requested():
        raise UserError(
            "experts in 4 bits are not supported under DeepSpeed; launch with launch/fsdp2.yaml or launch/ddp.yaml",
            option="model_name_or_path",
        )


def gathered_adapters(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Gather the whole weights of every adapter, under their names in ``model``, in host memory; a collective.

    Complete on every rank. None when ``model`` is not sharded: saving needs no help.
    """
    if not is_sharded(model):
        return None
    assert isinstance(model, PeftModel), "only adapters are gathered; a full model is saved by its trainer"
    # FSDP2 shards again, for a state dict, what an evaluation has left whole: a head beside the layers is.
    kept = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {name: parameters.get(name, tensor) for name, tensor in kept.items()}
    # What PEFT would write, found again under its own name: resized embeddings count, the base does not.
    wanted: set[int] = set()
    for adapter in model.peft_config:
        found = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter)
        wanted.update(id(tensor) for tensor in found.values())
    return {name: whole(tensor) for name, tensor in state.items() if id(tensor) in wanted}


def base_bytes(model: nn.Module) -> int:
    """Bytes of the frozen base on this rank between steps: its shards, and the scales of packed weights."""
    frozen = [p for name, p in model.named_parameters() if not p.requires_grad and ".lora_" not in name]
    states = [
        getattr(module.weight, "quant_state", None) or module.quant_state
        for module in model.modules()
        if isinstance(module, bnb.nn.Linear4bit)
    ]
    states += [module.quant_state for module in model.modules() if isinstance(module, Bnb4bitParametrization)]
    scales = [tensor for state in states for tensor in _tensors(state)]
    return sum(local_shard(parameter).nbytes for parameter in frozen) + sum(
        tensor.nbytes for tensor in scales
    )


def packed_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of packed 4-bit weights on this rank, and in the whole model."""
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    here = sum(local_shard(linear.weight).nbytes for linear in linears)
    total = sum(linear.in_features * linear.out_features // 2 for linear in linears)
    for stack in fsdp2.stacks(model).values():
        here += local_shard(stack.original).nbytes
        total += stack[0].quant_state.shape.numel() // 2
    return here, total


def _tensors(state: Any) -> list[torch.Tensor]:
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
