"""What this process was launched as, and whether 4-bit training is right under it."""

from halfbyte.distributed.ranks import agree, gather, on_every_rank
from halfbyte.distributed.strategy import Strategy, refuse_unsupported, strategy_in_force

__all__ = ["Strategy", "agree", "gather", "on_every_rank", "refuse_unsupported", "strategy_in_force"]
