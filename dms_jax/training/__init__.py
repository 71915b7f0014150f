"""The retrofit: configuration, data, the differentiated step, the course of a run, its plans.

Begin with `retrofit_config` (every key), then `run` (the course: prepare, restore, train, finish) and `step` (what is differentiated).
"""
