"""What this process was launched as, and whether 4-bit training is right under it."""

from halfbyte.distributed.launcher import launch_command
from halfbyte.distributed.ranks import FailedElsewhereError, agree, gather, on_every_rank
from halfbyte.distributed.sharded_optimizers import check_optimizer
from halfbyte.distributed.sharded_weights import (
    check_adapters,
    gathered_adapters,
    local_shard,
    save_adapters_whole,
)
from halfbyte.distributed.strategy import (
    SHARDED,
    Strategy,
    check_quantized,
    refuse_precision,
    refuse_unsupported,
    strategy_in_force,
)

__all__ = [
    "SHARDED",
    "FailedElsewhereError",
    "Strategy",
    "agree",
    "check_adapters",
    "check_optimizer",
    "check_quantized",
    "gather",
    "gathered_adapters",
    "launch_command",
    "local_shard",
    "on_every_rank",
    "refuse_precision",
    "refuse_unsupported",
    "save_adapters_whole",
    "strategy_in_force",
]
