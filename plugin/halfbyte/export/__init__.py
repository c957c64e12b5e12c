"""Models out of runs: merged for plain transformers, quantized ahead, and what quantization costs."""

MERGE_RECORD = "merge.json"  # of a merged model: what was merged, what it cost, and the files
