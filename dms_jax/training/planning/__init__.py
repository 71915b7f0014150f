"""Predict whether a retrofit fits on named hardware, and how long a step takes.

Begin with `step_plan`. `step_program` builds, compiles and times the real step, and `nearby_settings` searches for a
setting that fits when the given one does not.
"""
