"""Estimates made without running anything: FLOPs, memory, step time and the size of a server, for named hardware.

Begin with `serving_plan`, or with `dms_jax.training.planning` for a retrofit; nothing else in the package depends on this folder.
"""
