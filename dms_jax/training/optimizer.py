"""AdamW with clipping, warm-up and decay, and where its state lies on the mesh."""

from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax.training.retrofit_config import OptimizerConfig

FINAL_RATE = 0.1  # of the learning rate, after the decay


def rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up, constant, linear decay over the last part of `steps`."""
    peak, decay = config.learning_rate, round(config.decay_fraction * steps)
    rise = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    fall = optax.linear_schedule(peak, peak * FINAL_RATE, max(decay, 1))
    return optax.join_schedules([rise, fall], [steps - decay]) if decay else rise


def build_optimizer(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )


def optimizer_shardings(
    tx: optax.GradientTransformation, trainable: dict[str, jax.Array], shardings: dict[str, NamedSharding], mesh: Mesh
) -> Any:
    """Moments lie where their parameters lie, counters everywhere: pinned, so that no step moves them."""
    state = jax.eval_shape(tx.init, trainable)
    return optax.tree_utils.tree_map_params(
        tx,  # pyrefly: ignore[bad-argument-type]  # its `init` is all that is asked of it
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
