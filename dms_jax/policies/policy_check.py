"""`check_policy`: hold a policy to the contract of `cache_policy` on random rows."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.core.compact_cache import LayerCache, alive_pairs, apply_pending, empty_layer, write_pairs
from dms_jax.core.slot_attention import CacheOps, Chunk, extend_layer, slot_attention
from dms_jax.errors import ConfigError
from dms_jax.policies import policy_name, policy_of
from dms_jax.policies.budget_policy import BudgetPolicy
from dms_jax.policies.cache_policy import CachePolicy
from dms_jax.policies.own_policy import made

ROWS, CHUNKS = 20, (7, 1, 1, 7, 7, 7)  # tokens of the chunks that follow the prompt
BUDGET = 32  # of a class that has one, and tokens of the prompt of a policy without a budget
PADDING = 9.0  # larger than nearly all random numbers of the rows
CONFIG = ModelConfig("llama", 8, 32, 32, 1, 4, 2, 8, dms=DMSConfig(window_size=4))


class Rows(NamedTuple):
    """Random rows of n tokens, as one attention layer sees them."""

    q: Float[Array, "B n N H"]
    k: Float[Array, "B K n H"]
    v: Float[Array, "B K n H"]
    logits: Float[Array, "B K n"]


def check_policy(policy: Any) -> None:
    """Run 20 random rows under a policy, and raise a ConfigError of one line for the first rule that it breaks.

    `policy` is a policy with a small budget, the class of one, or a name. The rules: a head holds at most as many pairs
    as `slot_bounds` says; only pairs that are alive stay; scores are numbers, not NaN; neither dead slots, which hold
    NaN here, nor the padding of a chunk have an effect; and a policy that does not rank pairs after each chunk
    keeps the same pairs however a row is cut into chunks. It takes a few seconds, nearly all of it compilation.
    """
    if isinstance(policy, type) and getattr(policy, "has_budget", False):
        policy = made(policy, CONFIG, BUDGET)
    policy = policy_of(CONFIG, policy).in_cache()
    prompt, rng = getattr(policy, "budget", BUDGET), np.random.default_rng(0)
    counts = [rng.integers(0, size + 1, ROWS) for size in CHUNKS]
    first = prompt, rng.integers(1, prompt + 1, ROWS)
    steps = [first, *zip(CHUNKS, counts, strict=True)]
    held = _run(policy, steps, 0.0)
    if not np.array_equal(held, _run(policy, steps, np.nan)):
        raise _broken(policy, "lets dead slots or the padding of a chunk decide; mask them, as with pairs.alive")
    if not policy.ranks_pairs:
        single = [(1, (np.sum(counts, axis=0) > step).astype(int)) for step in range(sum(CHUNKS))]
        if not np.array_equal(held, _run(policy, [first, *single], 0.0)):
            raise _broken(
                policy, "keeps other pairs if a row is cut into other chunks; decide from positions and logits"
            )


def _run(policy: CachePolicy, steps: list[tuple[int, np.ndarray]], fill: float) -> Bool[np.ndarray, "B K n"]:
    """Extend random rows by chunks of (size, real tokens of each row); return which pairs are alive at the end.

    Dead slots hold `fill`, and padding holds it or, in place of NaN, another number. Raises ConfigError for a rule that
    the policy breaks.
    """
    heads, total = getattr(policy, "adakv_heads", None) or CONFIG.num_kv_heads, sum(size for size, _ in steps)
    config = replace(CONFIG, num_kv_heads=heads, num_q_heads=2 * heads)
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (ROWS, heads, total, config.head_dim)
    shapes = (ROWS, total, 2 * heads, config.head_dim), shape, shape, shape[:3]
    rows = Rows(*(jax.random.normal(key, size) for key, size in zip(keys, shapes, strict=True)))
    layer = empty_layer(
        ROWS, heads, total, config.head_dim, jnp.dtype("float32"), policy.features, policy.head_state(config)
    )
    if (table := policy.budget_table(1, heads)) is not None:
        layer = replace(layer, budget=jnp.asarray(np.repeat(table, ROWS, axis=0)))
    bounds, seen = policy.slot_bounds(), np.zeros(ROWS, np.int32)
    for size, count in steps:
        layer, faults = _step(layer, rows, seen, count.astype(np.int32), np.float32(fill), policy, size)
        seen = (seen + count).astype(np.int32)
        for what, found in faults.items():
            if found:
                raise _broken(policy, what)
        most = int(np.max(np.sum(_alive(layer, seen), axis=-1)))
        if bounds.max is not None and most > bounds.max:
            raise _broken(policy, f"keeps {most} pairs in a head, where slot_bounds allows {bounds.max}")
    held, alive = np.zeros(shape[:3], bool), _alive(layer, seen)
    row, head, _ = np.nonzero(alive)
    held[row, head, np.asarray(layer.position)[alive]] = True
    return held


def _alive(layer: LayerCache, seen: Int[np.ndarray, "B"]) -> Bool[np.ndarray, "B K n"]:
    return np.asarray(layer.expiry) >= seen[:, None, None] - 1


@partial(jax.jit, static_argnames=("policy", "size"))
def _step(
    layer: LayerCache,
    rows: Rows,
    seen: Int[Array, "B"],
    count: Int[Array, "B"],
    fill: Float[Array, ""],
    policy: CachePolicy,
    size: int,
) -> tuple[LayerCache, dict[str, Array]]:
    """Do what an attention layer does with the next `count` of `size` tokens; return the layer, and what is wrong."""
    real, finite = jnp.arange(size)[None] < count[:, None], jnp.nan_to_num(fill, nan=PADDING)

    def chunk_of(x: Array, axis: int) -> Array:
        part = jax.vmap(lambda row, start: lax.dynamic_slice_in_dim(row, start, size, axis - 1))(x, seen)
        # Attention may multiply the values of padding by 0, which NaN would survive.
        return jnp.where(jnp.expand_dims(real, [a for a in range(1, x.ndim) if a != axis]), part, finite)

    q, k, v, logits = (chunk_of(x, axis) for x, axis in zip(rows, (1, 2, 2, 2), strict=True))
    dead = layer.expiry < seen[:, None, None] - 1
    bury = lambda x: jnp.where(dead if x.ndim == 3 else dead[..., None], fill, x)
    layer = replace(
        layer,
        k=bury(layer.k),
        v=bury(layer.v),
        score=bury(layer.score),
        statistic=None if layer.statistic is None else bury(layer.statistic),
    )
    position = seen[:, None] + jnp.arange(size)[None]
    expiries = policy.mark(logits, position, count, 0.0)
    now = seen + count - 1
    alive = alive_pairs(apply_pending(layer, expiries, seen, count), expiries.expiry, now, count)
    faults: dict[str, Array] = {}
    if policy.ranks_pairs:
        asked = q, k, v, expiries, layer, position, count
        if isinstance(policy, BudgetPolicy):
            pairs = policy.pairs_after(*asked)
            nan = jnp.isnan(policy.keep_scores(pairs)) & pairs.alive
            faults["gives a pair that is alive the score NaN"] = jnp.any(nan)
        selection = policy.select(*asked)
        if selection is not None:
            faults["keeps pairs that are not alive; return only pairs that were"] = jnp.any(selection.kept & ~alive)
    chunk = Chunk(position, count, jnp.float32(0))
    out, layer = extend_layer(layer, q, k, v, expiries, chunk, policy, CacheOps(slot_attention, write_pairs))
    faults["lets attention read a dead slot, whose NaN reaches the output"] = jnp.any(
        real[..., None, None] & ~jnp.isfinite(out)
    )
    return layer, faults


def _broken(policy: CachePolicy, what: str) -> ConfigError:
    return ConfigError(f"policy {policy_name(policy)} {what}")
