"""The decoder as Flax NNX modules, and its parameters by name.

Begin with `attention_layer`, where DMS enters a decoder, or with `decoder` for the whole model. `parameters` is the
border to NNX.
"""
