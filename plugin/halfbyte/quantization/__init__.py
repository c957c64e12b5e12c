"""NF4 double-quantized bases: loading, compute dtype, coverage.

Only this package touches bitsandbytes' weights.
"""

from halfbyte.quantization.checkpoint import fingerprint
from halfbyte.quantization.coverage import Coverage, measure_coverage
from halfbyte.quantization.dtype import choose_compute_dtype
from halfbyte.quantization.load import load_base

__all__ = ["Coverage", "choose_compute_dtype", "fingerprint", "load_base", "measure_coverage"]
