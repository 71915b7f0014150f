"""Kernels for GPUs and TPUs: attention and cache updates, each equal to a function of `dms_jax.core`.

Begin with `attention_api`, whose functions the model calls, and with `kernel_table`, which has a record for each
kernel. `dispatch` decides which implementation runs, and `tuned` reads the measurements.
"""
