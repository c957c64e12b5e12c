"""What this process was launched as, and whether 4-bit training is right under it."""

from halfbyte.distributed.ranks import FailedElsewhereError, agree, gather, on_every_rank
from halfbyte.distributed.strategy import Strategy, refuse_precision, refuse_unsupported, strategy_in_force
from halfbyte.distributed.watch import explain, leave, record_flights, speaks_first, watch

__all__ = [
    "FailedElsewhereError",
    "Strategy",
    "agree",
    "explain",
    "gather",
    "leave",
    "on_every_rank",
    "record_flights",
    "refuse_precision",
    "refuse_unsupported",
    "speaks_first",
    "strategy_in_force",
    "watch",
]
