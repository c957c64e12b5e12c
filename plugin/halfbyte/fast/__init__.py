"""The fast step: fused layers and NF4+LoRA linears, a tiled head and padding-free batches, with plain TRL's numbers."""

from halfbyte.fast.apply import Path, apply, refusal
from halfbyte.fast.budget import check as check_memory_budget
from halfbyte.fast.layer import fell_back

__all__ = ["Path", "apply", "check_memory_budget", "fell_back", "refusal"]
