"""Pure functions on arrays: which query sees which pair, the compact cache, reference attention, losses, sampling.

Begin with `visibility` (the one rule) and `eviction` (from logits to decisions); `compact_cache` and `slot_attention`
apply both.
"""
