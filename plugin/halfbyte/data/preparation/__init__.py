"""Rows made ready for a trainer: rendered, tokenized, truncated, packed and counted, in batches."""
