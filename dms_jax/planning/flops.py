"""Count the FLOPs of a model from its shape. Recomputation, which a program adds to save memory, is not counted."""

from dms_jax.config import ModelConfig


def matmul_parameters(config: ModelConfig) -> int:
    """Count the weights that every token is multiplied by: all matrices except the input embedding."""
    heads = (2 * config.num_q_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * heads + 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def attention_flops(config: ModelConfig, length: int) -> float:
    """FLOPs per token of causal attention in the forward pass over a row of `length` tokens.

    On average, a token attends to half of the row, in each of two matrix products.
    """
    return 2.0 * config.num_layers * config.num_q_heads * config.head_dim * length


def step_flops(config: ModelConfig, length: int, mode: str) -> float:
    """FLOPs per token of a retrofit step: two forward passes (student, teacher) and the backward pass of the student.

    The backward pass computes the gradients of activations and, unless `mode` is "adapter", of weights. Attention takes
    two matrix products in the forward pass and five in the backward pass.
    """
    weights, attention = 2.0 * matmul_parameters(config), attention_flops(config, length)
    backward = (1 if mode == "adapter" else 2) * weights + 2.5 * attention
    return 2 * (weights + attention) + backward
