"""The save level of fused layers: the fastest one that fits a memory budget.

The estimate counts what a step adds to a loaded model, in bytes on one rank: what every layer keeps, the working
memory of one layer's backward, a chunk of logits, and gradients and two moments of each trained weight.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from halfbyte import distributed
from halfbyte.errors import UserError
from halfbyte.fast.family import Decoder, Linears
from halfbyte.fast.layer import LEVELS, FusedForward
from halfbyte.fast.scores import chunk_rows

_UNITS = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30, "TB": 10**12, "TiB": 2**40}
# The share of free memory that a step may plan with. Other processes use a host's free memory as well, and where it
# runs out the kernel kills one.
_SHARE = {"cuda": 0.9, "cpu": 0.5}
_LOG_SUM_BYTES = 4


@dataclass(frozen=True)
class Choice:
    """The level that was chosen, and why: bytes on one rank, for ``tokens`` a forward.

    ``recorded`` means that the level comes from the checkpoint and was not chosen here.
    """

    level: int
    budget: str
    available: int | None
    needed: int
    tokens: int
    recorded: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in JSON's types."""
        return asdict(self)


def check(budget: str) -> None:
    """Raise :class:`UserError` unless ``budget`` is ``auto``, ``min`` or a size."""
    if budget not in ("auto", "min"):
        _size(budget)


def apply(model: nn.Module, budget: str, tokens: int, recorded: int | None = None) -> Choice | None:
    """Set the level of every fused layer of ``model`` to what ``budget`` allows; None without fused layers.

    ``tokens`` is the largest number in one forward on one rank. ``auto`` plans with the memory that is free on the
    device now, ``min`` recomputes everything, a size is what a step may take beside the model. Rank 0 decides for
    all; on CPU the ranks of a machine share its memory. ``recorded`` is the level of a checkpoint, which is kept.
    """
    layers = [each.forward for each in model.modules() if isinstance(each.forward, FusedForward)]
    if not layers:
        return None
    parameter = next(layers[0].layer.parameters())
    available = None if budget == "min" else _free(parameter.device) if budget == "auto" else _size(budget)
    decoders = [each.decoder for each in layers]
    needs = needed(model, decoders, tokens)
    fitting = [level for level in LEVELS if available is not None and needs[level] <= available]
    level = distributed.agree(max(fitting, default=LEVELS[0])) if recorded is None else recorded
    for each in layers:
        each.level = level
    return Choice(level, budget, available, needs[level], tokens, recorded is not None)


def needed(model: nn.Module, decoders: Sequence[Decoder], tokens: int) -> dict[int, int]:
    """Return the bytes that a step of ``tokens`` tokens takes beside the loaded ``model``, by save level."""
    size = _item_size(decoders[0])
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 1)
    logits = 2 * chunk_rows(vocabulary, decoders[0].input_norm.module.weight.device.type) * vocabulary * 4
    trained = 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needs = {}
    for level in LEVELS:
        kept = tokens * sum(kept_per_token(decoder, level, size) for decoder in decoders)
        working = max(_working(decoder, level, size, tokens) for decoder in decoders)
        needs[level] = kept + working + logits + trained
    return needs


def kept_per_token(decoder: Decoder, level: int, size: int) -> int:
    """Return the bytes that one layer keeps of a token from forward to backward, in a dtype of ``size`` bytes."""
    stream, (attended, keys) = decoder.input_norm.module.weight.numel(), _widths(decoder)
    values = stream
    other = 0
    if level >= 1:
        values += stream + attended + _ranks(decoder.out) + _ranks(decoder.down)
        other += decoder.heads * _LOG_SUM_BYTES
    if level >= 2:
        values += attended + 2 * keys + _ranks(decoder.qkv)
    if level >= 3:
        values += _outputs(decoder.gate_up) + _ranks(decoder.gate_up)
    return values * size + other


def _working(decoder: Decoder, level: int, size: int, tokens: int) -> int:
    """Bytes that the backward of one layer holds at its peak beside what was kept."""
    stream = decoder.input_norm.module.weight.numel()
    recomputed = kept_per_token(decoder, 2, size) - kept_per_token(decoder, 0, size) if level == 0 else 0
    gate_up = _outputs(decoder.gate_up)
    of_a_token = recomputed + (2 * gate_up + gate_up + 6 * stream) * size
    weights = (gate_up + gate_up // 2) * stream * size
    return tokens * of_a_token + weights


def _free(device: torch.device) -> int:
    """Bytes that a step may plan with on ``device``."""
    if device.type != "cuda":
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return int(_SHARE["cpu"] * _host_memory() / local_ranks)
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    capped = torch.cuda.get_per_process_memory_fraction(device) * total - reserved
    return int(_SHARE["cuda"] * (min(free, capped) + reserved - allocated))


def _host_memory() -> int:
    """Bytes of host memory that are available, to this container where it has a limit (cgroup version 2)."""
    available: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
    except OSError:
        return available
    return available if limit.strip() == "max" else min(available, int(limit) - int(used))


def _size(budget: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]i?B)", budget.strip())
    if match is None:
        raise UserError(
            f"{budget!r} is neither `auto` nor `min` nor a size; write a size such as `12GiB` or `800MB`",
            option="memory_budget",
        )
    return int(float(match[1]) * _UNITS[match[2]])


def _widths(decoder: Decoder) -> tuple[int, int]:
    """Values of a token in its queries, and in its keys: Nq*D and Nkv*D."""
    return decoder.heads * decoder.head_size, decoder.kv_heads * decoder.head_size


def _outputs(linears: Linears) -> int:
    widths: list[Any] = [each.out_features for each in linears]
    return sum(widths)


def _ranks(linears: Linears) -> int:
    return sum(max(each.r.values()) for each in linears if isinstance(each, LoraLayer))


def _item_size(decoder: Decoder) -> int:
    size: int = decoder.input_norm.module.weight.element_size()
    return size
