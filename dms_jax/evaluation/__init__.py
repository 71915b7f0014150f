"""Measuring what a cache policy costs: divergence from the dense model on given text, and answers to tasks, at equal live tokens.

Begin with `evaluation_run` (one call of the command), then `arms` (what is compared); `held_out` validates a retrofit.
"""
