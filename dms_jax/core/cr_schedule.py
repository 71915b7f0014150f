"""Schedules of a retrofit: step -> target compression ratio -> target evicted fraction.

Source: Model-Optimizer `engine.py:222-246`.
"""

from typing import overload

import jax.numpy as jnp
from jaxtyping import Float, Int

from dms_jax.axes import Array, typed


@overload
def evict_fraction(cr: float) -> float: ...
@overload
def evict_fraction(cr: Array) -> Array: ...
def evict_fraction(cr):
    """Return 1 - 1/cr, the fraction of decisions that evict at a nominal compression ratio `cr` >= 1."""
    return 1.0 - 1.0 / cr


def realised_cr(nominal_cr: float, length: int, window_size: int) -> float:
    """Return the realised compression ratio after `length` tokens, given the nominal one.

    The last window_size + 1 pairs are always live; decisions are assumed not to depend on the position.
    """
    return length / (length - evict_fraction(nominal_cr) * max(0, length - 1 - window_size))


@typed
def target_cr(step: int | Int[Array, ""], initial_cr: float, final_cr: float, final_step: int) -> Float[Array, ""]:
    """Return a step's target ratio: linear from `initial_cr` at step 0 to `final_cr` at `final_step`, then constant."""
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / final_step, 0.0, 1.0)
    return initial_cr + (final_cr - initial_cr) * progress


@typed
def borrowed_channel_scale(step: int | Int[Array, ""], ramp_steps: int) -> Float[Array, ""]:
    """Return the factor of the borrowed query channel at a step of the ramp that frees it.

    The factor falls linearly from 1 at step 0 to 0 at `ramp_steps`. It is applied in the forward pass, because a factor
    on the weight would compound from step to step (Megatron-LM `dmc.py`).
    """
    return jnp.clip(1.0 - jnp.asarray(step, jnp.float32) / max(ramp_steps, 1), 0.0, 1.0)
