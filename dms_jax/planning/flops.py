"""FLOPs that a model needs, counted from its shape. Recomputation, which a program may add to save memory, is not counted."""

from dms_jax.config import ModelConfig


def matmul_parameters(config: ModelConfig) -> int:
    """Count the weights that each token is multiplied by: projections, MLP and output embedding, without the input embedding."""
    heads = (2 * config.num_q_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * heads + 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def attention_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of causal attention per token in the forward pass over a row of `length`: both products see half of the row on average."""
    return 2.0 * config.num_layers * config.num_q_heads * config.head_dim * length


def step_flops(config: ModelConfig, length: int, mode: str) -> float:
    """FLOPs of a retrofit step per token: the forward passes of student and teacher, and the backward pass through the student.

    The backward pass computes gradients of activations and, unless `mode` is adapter, of weights. Attention takes two products
    forward and five backward.
    """
    weights, attention = 2.0 * matmul_parameters(config), attention_flops(config, length)
    backward = (1 if mode == "adapter" else 2) * weights + 2.5 * attention
    return 2 * (weights + attention) + backward
