"""Predict memory, step time, communication and serving capacity on hardware that need not be at hand.

Begin with `hardware`, the known accelerators; then read `memory_estimate` and `roofline` for training, and
`serving_plan` for decoding. Plans are lists of `figures.Figure`.
"""
