"""The fast step: fused NF4+LoRA linears, a tiled head and padding-free batches, with plain TRL's numbers."""

from halfbyte.fast.apply import Path, apply, refusal

__all__ = ["Path", "apply", "refusal"]
