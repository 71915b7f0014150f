"""Measure what a cache policy costs at equal live tokens: its divergence from the dense model on given text, and the
accuracy of its answers.

Begin with `evaluation_run` (one run of the command `evaluate`), then `methods` (what is compared), `result_records`
(what is stored) and `aggregate` (what tables and reports show). `scaling_run` is a run of `hyperscale`; `held_out`
validates a retrofit.
"""
