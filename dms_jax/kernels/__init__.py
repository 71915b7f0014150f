"""Attention and cache updates for GPUs and TPUs, each equal to a function of `dms_jax.core`.

Begin with `attention_api`, which the model calls; `dispatch` decides which implementation runs, `block_sizes` how large its blocks are.
"""
