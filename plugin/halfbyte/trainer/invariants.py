"""What must be the same on every rank at every step, compared while training runs.

A comparison is one small all-gather, and under DDP one reduction over the adapters.
"""

from typing import Any

import torch
from accelerate.data_loader import get_sampler
from accelerate.utils import DistributedType, gather_object
from torch import nn
from transformers import TrainerControl, TrainerState

from halfbyte.distributed import base_bytes, packed_bytes
from halfbyte.trainer.base import Mixin

EVERY = 100
_FIRST = 2
# Rows of the comparison, before the checksums: what the message calls them.
_LABELS = "the number of labels they normalize by (is `average_tokens_across_devices` off?)"


class RanksDifferError(RuntimeError):
    """Ranks that train one model have stopped agreeing on what it is or how far it has come."""


class RankInvariants(Mixin):
    """Compares step, seeds and label counts of all ranks, and under DDP their trainable parameters too.

    Before the first step, after the first and the second, and then every hundredth. All ranks stop when one differs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._counted_labels: Any = 0
        self._compared_steps = 0
        super().__init__(*args, **kwargs)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._compared_steps = 0
        held = self._check_sharding()
        if self.conduct is not None:
            self.conduct.tracker.record.update(strategy={"base_bytes_per_rank": held})
        self._compare(state, kwargs.get("train_dataloader"))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self._compared_steps += 1
        if self._compared_steps == 1:
            self._check_sharding()  # nothing that was gathered for the step has stayed
        if self._compared_steps <= _FIRST or state.global_step % EVERY == 0:
            self._compare(state, kwargs.get("train_dataloader"))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of a step, and add up the labels that its loss is divided by."""
        batches, number = super().get_batch_samples(*args, **kwargs)
        if number is not None:
            self._counted_labels = self._counted_labels + number  # a tensor stays one: no wait for the device
        return batches, number

    def _compare(self, state: TrainerState, loader: Any) -> None:
        if self.args.world_size == 1:
            return
        mine = {
            "the step": state.global_step,
            "the seeds of data and dropout": _seeds(self.args, loader),
            _LABELS: int(self._counted_labels),
        }
        if self.accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
            mine |= checksums(self.accelerator.unwrap_model(self.model))
        ranks = gather_object([mine])
        if (difference := first_difference(ranks)) is not None:
            raise RanksDifferError(f"after step {state.global_step} the ranks differ in {difference}")

    def _check_sharding(self) -> list[int]:
        """Raise if the base must be sharded and is whole on some rank; return each rank's bytes of it."""
        model = self.accelerator.unwrap_model(self.model)
        held = gather_object([(base_bytes(model), *packed_bytes(model))])
        sharding = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharding and (problem := replicated([(here, whole) for _, here, whole in held])):
            raise RuntimeError(problem)
        return [base for base, _, _ in held]


def checksums(model: nn.Module) -> dict[str, int]:
    """A checksum of the bits of every trainable parameter, by name; equal weights have equal checksums."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    sums = [_checksum(parameter.detach()) for _, parameter in named]
    values = torch.stack(sums).tolist() if sums else []  # one wait for the device, not one a tensor
    return {name: int(value) for (name, _), value in zip(named, values, strict=True)}


def first_difference(ranks: list[dict[str, Any]]) -> str | None:
    """The first entry in which ``ranks`` differ, with each rank's value; None if they agree."""
    for name in ranks[0]:
        values = [rank.get(name) for rank in ranks]
        if any(value != values[0] for value in values):
            return f"{name}: " + ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
    return None


def replicated(held: list[tuple[int, int]]) -> str | None:
    """Why the packed weights, (bytes on a rank, bytes of the whole model) for each rank, are not sharded.

    A rank may hold its shard and the rounding of uneven shards; None if all do.
    """
    world = len(held)
    for rank, (here, whole) in enumerate(held):
        if world > 1 and here > whole / world * 1.5:
            return (
                f"rank {rank} holds {here:,} of the {whole:,} bytes of 4-bit weights, where {world} ranks should "
                f"hold {whole // world:,} each: the base was not sharded"
            )
    return None


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    width = torch.int32 if tensor.element_size() == 4 else torch.uint8
    bits = tensor.contiguous().view(-1).view(width).to(torch.int64)
    places = torch.arange(bits.numel(), device=bits.device) % 65521 + 1
    return (bits * places).sum()


def _seeds(args: Any, loader: Any) -> list[int | None]:
    """The seeds as given, of this rank's random numbers, and of the sampler with its epoch."""
    sampler = get_sampler(loader) if loader is not None else None
    order = [getattr(sampler, name, None) for name in ("initial_seed", "epoch")]
    return [args.seed, args.data_seed, torch.initial_seed(), *order]
