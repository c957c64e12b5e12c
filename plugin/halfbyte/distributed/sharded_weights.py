"""Weights that are divided over the ranks: which may be, gathered for saving, measured for the record."""

from collections.abc import Iterable
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

from halfbyte.distributed import fsdp2, zero3
from halfbyte.errors import UserError


def check_adapters(configs: Iterable[LoraConfig]) -> None:
    """Raise :class:`UserError` for adapters, fresh or loaded, that are wrong on a base that is to be divided.

    Trained embedding rows crash torch 2.13 under FSDP2, with the head tied to them or not: signal 11 after a few
    steps, each time elsewhere. PEFT 0.21 makes DoRA's magnitudes from base weights, which under DeepSpeed are not
    gathered for it.
    """
    if not (fsdp2.requested() or zero3.requested()):
        return
    for config in configs:
        if config.trainable_token_indices:
            raise UserError(
                "additional_special_tokens: the adapter trains embedding rows, which is right under DDP only: launch "
                "with launch/ddp.yaml"
            )
        if config.use_dora and zero3.requested():
            raise UserError(
                "use_dora: true fails under DeepSpeed (it reads base weights that are not gathered); take it out, or "
                "launch with launch/fsdp2.yaml or launch/ddp.yaml"
            )


def is_divided(model: nn.Module) -> bool:
    """Whether the parameters of ``model`` are divided over the ranks, by FSDP2 or by ZeRO-3."""
    return isinstance(model, FSDPModule) or any(hasattr(p, "ds_id") for p in model.parameters())


def gathered_adapters(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The whole weights of every adapter, under their names in ``model``, in host memory; a collective.

    Complete on every rank. None when nothing is divided: saving needs no help.
    """
    if not is_divided(model):
        return None
    assert isinstance(model, PeftModel), "only adapters are gathered; a full model is saved by its trainer"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {name: parameters.get(name, tensor) for name, tensor in model.state_dict().items()}
    # What PEFT would write, found again under its own name: resized embeddings count, the base does not.
    wanted: set[int] = set()
    for adapter in model.peft_config:
        found = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter)
        wanted.update(id(tensor) for tensor in found.values())
    return {name: _whole(tensor) for name, tensor in state.items() if id(tensor) in wanted}


def save_adapters_whole(trainer: Trainer) -> None:
    """Have ``trainer`` put the whole adapter into its checkpoints, beside the shards it resumes from.

    transformers 5.23 writes no adapter at all with sharded state dicts, and with full ones it first gathers the
    whole base; under ZeRO-3 it writes the trained adapter in a frozen reference's place (Trainer.save_model).
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    stock = trainer.save_model

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        weights = gathered_adapters(trainer.model) if isinstance(trainer.model, PeftModel) else None
        if weights is None:
            stock(output_dir, _internal_call)
            return
        trainer._save(output_dir, state_dict=weights)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)

    trainer.save_model = save_model


def base_bytes(model: nn.Module) -> int:
    """Bytes of the frozen base that this rank holds between steps: its shards, and the scales of packed weights."""
    frozen = [p for name, p in model.named_parameters() if not p.requires_grad and ".lora_" not in name]
    states = [
        getattr(module.weight, "quant_state", None) or module.quant_state
        for module in model.modules()
        if isinstance(module, bnb.nn.Linear4bit)
    ]
    scales = [tensor for state in states for tensor in _tensors(state)]
    return sum(local_shard(parameter).nbytes for parameter in frozen) + sum(
        tensor.nbytes for tensor in scales
    )


def packed_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of packed 4-bit weights on this rank, and in the whole model."""
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    here = sum(local_shard(linear.weight).nbytes for linear in linears)
    whole = sum(linear.in_features * linear.out_features // 2 for linear in linears)
    return here, whole


def local_shard(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor."""
    if isinstance(parameter, DTensor):
        return parameter.tolocal_shard()
    return getattr(parameter, "ds_tensor", parameter)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach().cpu()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone()
    return tensor.detach().cpu()


def _tensors(state: Any) -> list[torch.Tensor]:
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
