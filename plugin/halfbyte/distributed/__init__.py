"""What this process was launched as, and whether 4-bit training is right under it."""

from halfbyte.distributed.invariants import watch_invariants
from halfbyte.distributed.ranks import agree, gather, on_every_rank
from halfbyte.distributed.sharded_optimizers import check_optimizer
from halfbyte.distributed.sharded_weights import gathered_adapters, save_adapters_whole
from halfbyte.distributed.strategy import (
    SHARDED,
    Strategy,
    check_quantized,
    refuse_unsupported,
    strategy_in_force,
)

__all__ = [
    "SHARDED",
    "Strategy",
    "agree",
    "check_optimizer",
    "check_quantized",
    "gather",
    "gathered_adapters",
    "on_every_rank",
    "refuse_unsupported",
    "save_adapters_whole",
    "strategy_in_force",
    "watch_invariants",
]
