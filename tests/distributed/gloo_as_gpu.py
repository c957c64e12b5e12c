"""``halfbyte`` with CPU ranks that are sharded as GPUs are, over gloo.

Launched in place of ``-m halfbyte``. On CPUs accelerate otherwise trains with DDP when FSDP was requested
(accelerate/state.py), which halfbyte refuses, and DeepSpeed compiles collectives of its own at the first launch
(deepspeed/comm/torch.py), which takes a compiler and minutes.
"""

import importlib
import os
import runpy
from typing import Any

from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType


def install() -> None:
    """Call a process group of CPU ranks MULTI_GPU, which accelerate turns into FSDP where requested."""
    stock = PartialState.__init__

    def init(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        stock(self, cpu, **kwargs)
        if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
            self.__dict__["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def install_for_deepspeed() -> None:
    """Leave all of DeepSpeed's collectives to the process group, and let no weight stay gathered, however small."""
    # By name: as an attribute of its package, `torch` is torch itself.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    stock = DeepSpeedPlugin.__post_init__

    def shard_all(self: Any) -> None:
        stock(self)
        self.hf_ds_config.config["zero_optimization"].update(
            stage3_param_persistence_threshold=0,
            stage3_prefetch_bucket_size=0,
            stage3_max_live_parameters=0,
            stage3_max_reuse_distance=0,
        )

    DeepSpeedPlugin.__post_init__ = shard_all


def install_as_launched() -> None:
    """Install what the strategy needs that the launcher requested."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        install_for_deepspeed()
    else:
        install()


if __name__ == "__main__":
    install_as_launched()
    runpy.run_module("halfbyte", run_name="__main__")
