"""Pure arrays in, arrays out: who sees whom, the compact cache, reference attention, losses, sampling.

Begin with `visibility` (the one rule) and `eviction` (from logits to decisions); `compact_cache` applies both.
"""
