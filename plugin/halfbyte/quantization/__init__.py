"""NF4 double-quantized bases: loading, compute dtype, coverage.

Only this package touches bitsandbytes' weights.
"""

from halfbyte.quantization.checkpoint import fingerprint, require, weight_bytes
from halfbyte.quantization.compute import compute_in_float32
from halfbyte.quantization.coverage import Coverage, measure_coverage
from halfbyte.quantization.dtype import choose_compute_dtype
from halfbyte.quantization.experts import shapes as stacks_of
from halfbyte.quantization.load import load_base, planned
from halfbyte.quantization.shape import Shape, shape_of
from halfbyte.quantization.skeleton import shown_dense

__all__ = [
    "Coverage",
    "Shape",
    "choose_compute_dtype",
    "compute_in_float32",
    "fingerprint",
    "load_base",
    "measure_coverage",
    "planned",
    "require",
    "shape_of",
    "shown_dense",
    "stacks_of",
    "weight_bytes",
]
