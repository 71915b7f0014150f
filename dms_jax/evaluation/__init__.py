"""Measure what a cache policy costs: divergence from the dense model on given text, and answers to tasks, at equal live
tokens.

Begin with `evaluation_run` (one run of `infer.evaluate`), then `methods` (what is compared), `result_records` (what is
stored) and `aggregate` (what tables and reports show). `scaling_run` is a run of `infer.hyperscale`; `held_out`
validates a retrofit.
"""
