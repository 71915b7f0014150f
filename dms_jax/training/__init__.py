"""The retrofit: configuration, data, the differentiated step, the run with its checkpoints and its export.

Begin with `retrofit_config` (every key), then `run` (the course of a retrofit) and `step` (what is differentiated).
"""
