"""Predictions about hardware that need not be at hand: memory, step time, communication, and what a server can hold.

Every prediction is a list of `figures.Figure`. Begin with `hardware` for the known accelerators, then `memory_estimate` and `roofline`
for training and `serving_plan` for decoding.
"""
