"""``halfbyte`` with CPU ranks that accelerate takes for GPUs, so that FSDP2 really wraps them, over gloo.

Launched in place of ``-m halfbyte``. On CPUs accelerate otherwise trains with DDP when FSDP was asked for
(accelerate/state.py), which halfbyte refuses.
"""

import runpy
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType


def install() -> None:
    """Call a process group of CPU ranks MULTI_GPU, which accelerate turns into FSDP where asked."""
    stock = PartialState.__init__

    def init(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        stock(self, cpu, **kwargs)
        if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
            self.__dict__["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


if __name__ == "__main__":
    install()
    runpy.run_module("halfbyte", run_name="__main__")
