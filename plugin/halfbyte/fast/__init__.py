"""The fast step: fused NF4+LoRA linears, a tiled head and padding-free batches, with plain TRL's numbers."""
