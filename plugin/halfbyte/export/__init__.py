"""Models out of runs: merged for plain transformers, quantized ahead, and what quantization costs."""
