"""The dtype that a 4-bit base computes in: the one that this device supports natively."""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte import files, store
from halfbyte.quantization.shape import Shape

_DTYPES = ("float32", "bfloat16")
_TOKENS, _TIMES, _LONG = (
    256,
    6,
    1.0,
)  # tokens, runs of each dtype, and the seconds after which no more are made


def choose_compute_dtype(
    device: torch.device,
    shape: Shape | None = None,
    *,
    capability: Callable[[torch.device], tuple[int, int]] = torch.cuda.get_device_capability,
    bfloat16_is_faster: Callable[[Shape], bool] | None = None,
) -> torch.dtype:
    """Return bfloat16 where it is native, else a dtype that is fast and safe on the device.

    CUDA: bfloat16 from compute capability 8.0. Below it float16, which requires a gradient scaler, since bfloat16
    is emulated there. CPU: the faster of bfloat16 and float32 for a base of ``shape``, measured: bfloat16 without
    AVX512-BF16 or AMX can be a hundred times slower, and with them still slower for narrow layers.
    """
    if device.type == "cuda":
        return torch.bfloat16 if capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        faster = bfloat16_is_faster or cpu_bfloat16_is_faster
        return torch.bfloat16 if faster(shape or Shape()) else torch.float32
    return torch.bfloat16


def cpu_bfloat16_is_faster(shape: Shape) -> bool:
    """Return whether this CPU trains a layer of ``shape`` faster in bfloat16 than in float32.

    The times are kept in the user's cache, and measured again for another shape, torch, CPU or number of threads, and
    where the file is damaged.
    """
    shape = shape.timed()
    seconds = _read(shape)
    if seconds is None:
        seconds = _best_times(shape)
        content = json.dumps({"machine": _machine(shape), "seconds": seconds})
        with suppress(OSError):  # without a cache a run measures again
            files.replace_file(_record(shape), content.encode())
    return seconds["bfloat16"] < seconds["float32"]


def _record(shape: Shape) -> Path:
    """The file that keeps the times on this machine. Raises OSError if the user has no cache."""
    key = files.digest_of(_machine(shape))[:16]
    return store.cache_directory() / "dtype" / f"{key}.json"


def _machine(shape: Shape) -> dict[str, Any]:
    """Everything that decides which dtype is faster."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = [next((x for x in lines if x.startswith(name)), "") for name in ("model name", "flags")]
    except OSError:
        cpu = [platform.processor(), platform.machine()]
    return {
        "cpu": cpu,
        # Both cap the instructions that are used.
        "capped": [os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "shape": asdict(shape),
    }


def _read(shape: Shape) -> dict[str, float] | None:
    try:
        seconds = json.loads(files.read(_record(shape), 10_000))["seconds"]
        return {name: float(seconds[name]) for name in _DTYPES}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def _best_times(shape: Shape) -> dict[str, float]:
    """Seconds of one decoder layer of ``shape`` on 256 tokens, forward and backward, by dtype: the best of a few.

    The dtypes take turns, so that another process on the machine slows both.
    """
    sizes = {"square": (shape.hidden,) * 2, "wide": (shape.feed_forward, shape.hidden)}
    sizes["narrow"] = sizes["wide"][::-1]
    with torch.random.fork_rng(devices=[]):
        hidden = torch.randn(1, _TOKENS, shape.hidden)
        weights = [torch.randn(size) * size[1] ** -0.5 for size in sizes.values()]
    best = dict.fromkeys(_DTYPES, float("inf"))
    begun = time.perf_counter()
    for _ in range(_TIMES):
        for name in _DTYPES:
            dtype = getattr(torch, name)
            inputs, cast = hidden.to(dtype).requires_grad_(), [weight.to(dtype) for weight in weights]
            start = time.perf_counter()
            output = _layer(inputs, cast, shape)
            output.backward(torch.ones_like(output))
            best[name] = min(best[name], time.perf_counter() - start)
        if time.perf_counter() - begun > _LONG:  # an emulated dtype can take seconds
            break
    return best


def _layer(hidden: Tensor, weights: list[Tensor], shape: Shape) -> Tensor:
    """A decoder layer without positions on ``hidden`` ``[1, T, H]``: products, attention, and what is by element."""
    square, wide, narrow = weights
    normed = _norm(hidden)
    heads = (1, -1, shape.heads, shape.hidden // shape.heads)
    width = heads[2] * heads[3]
    query, key, value = (
        functional.linear(normed, square[:width]).view(heads).transpose(1, 2) for _ in range(3)
    )
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    mixed = mixed.transpose(1, 2).reshape(1, -1, width)
    hidden = hidden + functional.linear(mixed, square[:, :width])
    normed = _norm(hidden)
    gated = functional.silu(functional.linear(normed, wide)) * functional.linear(normed, wide)
    return hidden + functional.linear(gated, narrow)


def _norm(hidden: Tensor) -> Tensor:
    exact = hidden.float()
    return (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)
