"""The decoder as Flax NNX modules, and its parameters by name.

Begin with `decoder`; `attention_layer` is where queries meet a cache policy.
"""
