"""Every combination of strategy, base storage and optimizer: supported, or refused with the reason.

Refusals at run time and the two support tables of the documentation come from the tables here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import UserError

ANY = "any"


@dataclass(frozen=True)
class Combination:
    """One row: under ``strategy``, a base stored as ``storage``, trained with an ``optimizer``.

    ``reason`` says why it is refused, or what makes it right; ``instead`` is what to write after a refusal.
    """

    strategy: str
    storage: str
    optimizer: str
    supported: bool
    reason: str
    instead: str = ""

    def matches(self, strategy: str, storage: str, optimizer: str) -> bool:
        wanted = (strategy, storage, optimizer)
        own = (self.strategy, self.storage, self.optimizer)
        return all(ANY in pair or pair[0] == pair[1] for pair in zip(own, wanted, strict=True))


DDP = "accelerate launch --config_file launch/ddp.yaml -m halfbyte ..."
FSDP2 = "accelerate launch --config_file launch/fsdp2.yaml -m halfbyte ..."

# The names that the documentation and messages show.
STRATEGIES = {
    "single": "one process",
    "ddp": "DDP",
    "data_parallel": "`nn.DataParallel` (one process, several GPUs)",
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "deepspeed_file": "DeepSpeed with a configuration file of its own",
    "megatron": "Megatron-LM",
    "parallelism": "accelerate's tensor, context or sequence parallelism",
    "other": "other devices (TPU, XPU, NPU, ...)",
}

# The first row that matches decides.
TABLE = (
    Combination("single", ANY, ANY, True, "one whole base on one device"),
    Combination("ddp", ANY, ANY, True, "a whole base on every rank; the losses equal one process"),
    Combination(
        "data_parallel", ANY, ANY, False, "it scatters replicas of a 4-bit base without its scales", DDP
    ),
    Combination(
        "fsdp1",
        ANY,
        ANY,
        False,
        "it cannot flatten packed weights, and saves adapters without weights",
        FSDP2,
    ),
    Combination(
        "fsdp2", ANY, "8-bit", False, "8-bit optimizer states cannot be sharded", "optim: adamw_torch"
    ),
    Combination(
        "fsdp2", "other float", ANY, False, "packed bytes would be cast to another dtype and corrupted", FSDP2
    ),
    Combination(
        "fsdp2",
        "uint8",
        "32-bit",
        True,
        "torch 2.13 shards the packed weights; the losses equal one process",
    ),
    Combination(
        "fsdp2", "mixed-precision float", "32-bit", True, "below torch 2.13; the losses equal one process"
    ),
    Combination(
        "zero3", ANY, "8-bit", False, "8-bit optimizer states cannot be sharded", "optim: adamw_torch"
    ),
    Combination("zero3", ANY, ANY, True, "the packed weights are sharded; the losses equal one process"),
    Combination("zero1", ANY, ANY, False, "it keeps the whole base on every rank, as DDP does", DDP),
    Combination("zero2", ANY, ANY, False, "it keeps the whole base on every rank, as DDP does", DDP),
    Combination(
        "deepspeed_file",
        ANY,
        ANY,
        False,
        "its settings (offloading, 16-bit weights, optimizers) are not tested",
        "`zero_stage: 3`, as in launch/zero3.yaml",
    ),
    Combination("megatron", ANY, ANY, False, "it does not load 4-bit bases", DDP),
    Combination("parallelism", ANY, ANY, False, "packed weights have no rows or columns to split", DDP),
    Combination(
        "other", ANY, ANY, False, "bitsandbytes' 4-bit training is tested on CUDA and CPUs only", DDP
    ),
)


@dataclass(frozen=True)
class Option:
    """A launcher option that is refused under ``strategy``, and the environment variable that it sets on the ranks."""

    strategy: str
    name: str
    variable: str
    instead: str
    reason: str


OPTIONS = (
    Option(
        "fsdp2",
        "fsdp_offload_params",
        "FSDP_OFFLOAD_PARAMS",
        "false",
        "CPU offload of 4-bit weights is not tested; sharded over the ranks they are small",
    ),
    Option(
        "fsdp2",
        "fsdp_cpu_ram_efficient_loading",
        "FSDP_CPU_RAM_EFFICIENT_LOADING",
        "false",
        "transformers and accelerate ignore it for a 4-bit base",
    ),
    Option(
        "fsdp2",
        "fsdp_activation_checkpointing",
        "FSDP_ACTIVATION_CHECKPOINTING",
        "false",
        "the run checkpoints activations itself (`gradient_checkpointing`, on by default)",
    ),
    Option(
        "fsdp2",
        "fsdp_ignored_modules",
        "FSDP_IGNORED_MODULES",
        "null",
        "every module of a 4-bit base is sharded",
    ),
    Option(
        "zero3",
        "offload_param_device",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
        "none",
        "offloading a 4-bit model is not tested",
    ),
    Option(
        "zero3",
        "offload_optimizer_device",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "none",
        "offloading a 4-bit model is not tested",
    ),
)
_OFF = ("", "0", "false", "no", "none")


def refused_option(strategy: str, values: Mapping[str, Any]) -> str | None:
    """Return why the first refused option in ``values``, by name or variable, is refused, and what to write instead."""
    for option in OPTIONS:
        value = values.get(option.variable, values.get(option.name))
        if option.strategy == strategy and str(value or "").lower() not in _OFF:
            return (
                f"{option.name}: {value} under {STRATEGIES[strategy]}: {option.reason}; "
                f"write `{option.name}: {option.instead}`, as in launch/{strategy}.yaml"
            )
    return None


def find(strategy: str, storage: str = ANY, optimizer: str = ANY) -> Combination:
    """Return the row that decides; with ``any`` for what is not known yet, a supported row if there is one."""
    rows = [row for row in TABLE if row.matches(strategy, storage, optimizer)]
    assert rows, f"no row for {strategy}, {storage}, {optimizer}"
    if ANY in (storage, optimizer):
        return next((row for row in rows if row.supported), rows[-1])
    return rows[0]


def require(strategy: str, storage: str = ANY, optimizer: str = ANY) -> None:
    """Raise :class:`UserError` if the combination is refused: the reason, and what to write instead."""
    row = find(strategy, storage, optimizer)
    if row.supported:
        return
    details = [
        f"{kind} {value}"
        for kind, value in (("storage", row.storage), ("optimizer", row.optimizer))
        if value != ANY
    ]
    name = STRATEGIES[strategy] + (f" with {' and '.join(details)}" if details else "")
    raise UserError(
        f"this run was launched under {name}, which is refused: {row.reason}; instead: {row.instead}"
    )


def markdown() -> str:
    """Return the support tables of the documentation: combinations, and launcher options."""
    lines = ["| Strategy | Base stored as | Optimizer | | Why |", "|---|---|---|---|---|"]
    for row in TABLE:
        verdict = "supported" if row.supported else "refused"
        lines.append(
            f"| {STRATEGIES[row.strategy]} | {row.storage} | {row.optimizer} | {verdict} | {row.reason} |"
        )
    lines += ["", "| Refused option | Under | Instead | Why |", "|---|---|---|---|"]
    lines += [f"| `{o.name}` | {STRATEGIES[o.strategy]} | `{o.instead}` | {o.reason} |" for o in OPTIONS]
    return "\n".join(lines)
