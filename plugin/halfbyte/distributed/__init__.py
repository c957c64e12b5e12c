"""How this process was launched, which strategies 4-bit training supports, and what sharded models need."""

from halfbyte.distributed.launcher import launch_command
from halfbyte.distributed.ranks import agree, gather, in_step, on_every_rank, on_the_first
from halfbyte.distributed.sharded_optimizers import check_optimizer
from halfbyte.distributed.sharded_weights import (
    base_bytes,
    check_adapters,
    check_experts,
    gathered_adapters,
    packed_bytes,
)
from halfbyte.distributed.shards import is_sharded, local_shard, whole
from halfbyte.distributed.strategy import (
    SHARDED,
    Strategy,
    check_quantized,
    refuse_precision,
    refuse_unsupported,
    strategy_in_use,
)

__all__ = [
    "SHARDED",
    "Strategy",
    "agree",
    "base_bytes",
    "check_adapters",
    "check_experts",
    "check_optimizer",
    "check_quantized",
    "gather",
    "gathered_adapters",
    "in_step",
    "is_sharded",
    "launch_command",
    "local_shard",
    "on_every_rank",
    "on_the_first",
    "packed_bytes",
    "refuse_precision",
    "refuse_unsupported",
    "strategy_in_use",
    "whole",
]
