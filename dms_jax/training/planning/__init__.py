"""Predict whether a retrofit fits on named hardware, and how long a step takes.

Begin with `step_plan`. `step_program` is the part that builds, compiles and times the real step; `nearby_settings` looks for a setting
that fits when the given one does not.
"""
