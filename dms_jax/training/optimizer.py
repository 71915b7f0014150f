"""AdamW with clipping, warm-up and decay, and the shardings of its state."""

from typing import Any

import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax.training.retrofit_config import OptimizerConfig

FINAL_RATE = 0.1  # learning rate after the decay, as a fraction of the peak


def rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up, then constant, then linear decay over the last part of
    `steps`."""
    peak, warmup, decay = config.learning_rate, config.warmup_steps, round(config.decay_fraction * steps)
    assert peak is not None and warmup is not None, "RetrofitConfig.resolved gives them their values"
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    fall = optax.linear_schedule(peak, peak * FINAL_RATE, max(decay, 1))
    return optax.join_schedules([rise, fall], [steps - decay]) if decay else rise


def build_optimizer(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )


def optimizer_shardings(
    tx: optax.GradientTransformation, opt_state: Any, shardings: dict[str, NamedSharding], mesh: Mesh
) -> Any:
    """Return the shardings of the optimizer state: moments like their parameters (`shardings`), counters replicated.

    The shardings are pinned so that no step moves the state. `opt_state` may consist of ShapeDtypeStructs.
    """
    return optax.tree_utils.tree_map_params(
        tx,  # pyrefly: ignore[bad-argument-type]  # optax uses only its `init`
        lambda _, sharding: sharding,
        opt_state,
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
