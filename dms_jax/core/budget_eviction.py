"""Lazy eviction: nothing leaves while a head is within its budget; then, the pair with the highest score does.

A pair settles at the first query outside its window, q = p + window_size + 1. Of the settled pairs of a head, the
`budget - window_size - 1` with the lowest scores survive: whenever one more settles, the one with the highest score
leaves, the oldest among equals, as in `compact_cache.victim`. Scores never change, so this is a top-k of a stream:

    pair k is gone at query q  <=>  k has settled, and at least budget - window_size - 1 pairs with lower scores have

A pair thus expires one query before the query at which that many better pairs, and itself, have settled. This depends
on the pairs up to q and on the budget alone, so any division of a row into chunks gives the same expiries. Pairs that
left earlier need not be remembered: a pair that was worse than all survivors is worse than every pair that still lives.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from dms_jax.axes import Array, typed
from dms_jax.core.compact_cache import Expiries, victim
from dms_jax.core.visibility import NEVER, is_outside_window, segment_bounds


def keep_budgets(
    layer: Any, expiries: Expiries, seen: Int[Array, "B"], count: Int[Array, "B"], window_size: int
) -> tuple[Any, Expiries]:
    """Let pairs of the slots and of a chunk expire at the queries of the chunk at which a head exceeds its budget.

    The first `count` tokens of each row are real. A layer without budgets is returned unchanged. A layer is a dataclass
    with the position, expiry and score of each slot, as `LayerCache` has them, and the budget of each head.
    """
    if layer.budget is None:
        return layer, expiries
    capacity, length = layer.position.shape[-1], expiries.expiry.shape[-1]
    if length == 1:  # at most one pair settles, so a maximum is enough, as in the overflow rule
        now, alive = seen[:, None, None], layer.expiry >= seen[:, None, None]
        settled = alive & is_outside_window(now, jnp.where(alive, layer.position, 0), window_size)
        over = (jnp.sum(settled, axis=-1) > layer.budget - window_size - 1) & (count > 0)[:, None]
        leaves = victim(alive, layer.position, layer.score, seen, window_size)
        at = over[..., None] & (jnp.arange(capacity)[None, None] == leaves[..., None])
        return replace(layer, expiry=jnp.where(at, now - 1, layer.expiry)), expiries
    position = jnp.broadcast_to((seen[:, None] + jnp.arange(length)[None])[:, None], expiries.expiry.shape)
    both = lambda slots, chunk: jnp.concatenate([slots, chunk], axis=-1)
    expiry = budgeted_expiry(
        both(layer.position, position),
        both(layer.score, expiries.score),
        both(layer.expiry, expiries.expiry),
        layer.budget,
        seen,
        count,
        length,
        window_size,
    )
    return replace(layer, expiry=expiry[..., :capacity]), expiries._replace(expiry=expiry[..., capacity:])


@typed
def budgeted_row_expiry(
    score: Float[Array, "B K T"],
    budget: Int[Array, "B K"],
    window_size: int,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Int[Array, "B K T"]:
    """Return the expiry of each pair of whole rows whose pairs have the scores `score`; NEVER for those that stay.

    Each segment of a packed row is a stream of its own.
    """
    batch, _, length = score.shape
    start = None if segment_ids is None else segment_bounds(segment_ids)[0]
    return budgeted_expiry(
        jnp.broadcast_to(jnp.arange(length)[None, None], score.shape),
        score,
        jnp.full(score.shape, NEVER, jnp.int32),
        budget,
        jnp.zeros(batch, jnp.int32),
        jnp.full(batch, length, jnp.int32),
        length,
        window_size,
        start,
    )


@typed
def budgeted_expiry(
    position: Int[Array, "B K S"],
    score: Float[Array, "B K S"],
    expiry: Int[Array, "B K S"],
    budget: Int[Array, "B K"],
    first: Int[Array, "B"],
    count: Int[Array, "B"],
    length: int,
    window_size: int,
    start: Int[Array, "B S"] | None = None,
) -> Int[Array, "B K S"]:
    """Return the expiries of S pairs after the queries `first` to `first + count - 1`.

    Args:
      expiry: the expiries before these queries; pairs with one before `first` are dead, and may hold anything.
      budget: live pairs of each head, at least `window_size` + 1.
      length: the largest possible `count`.
      start: index of the first pair of each pair's segment, for pairs in order of position; None for one segment.
    """
    alive = expiry >= first[:, None, None]
    # The number of the query at which each pair settles; `length` if none of these does.
    settles = jnp.clip(jnp.where(alive, position, 0) - first[:, None, None] + (window_size + 1), 0, length)
    settles = jnp.where(alive, settles, length)
    start = jnp.zeros_like(position[:, 0]) if start is None else start

    def of_head(position, score, settles, budget, start):
        best = jnp.lexsort((-position, score, start))  # segments keep their places
        ordered, index = settles[best], jnp.arange(len(best), dtype=jnp.int32)
        better = _nth_smallest(ordered, start, index, budget - window_size - 2, length.bit_length())
        return jnp.zeros_like(settles).at[best].set(jnp.maximum(ordered, better), unique_indices=True)

    of_row = jax.vmap(of_head, (0, 0, 0, 0, None))
    leaves = jax.vmap(of_row)(position, score, settles, budget, start)
    return jnp.where(leaves < count[:, None, None], first[:, None, None] + leaves - 1, expiry)


def _nth_smallest(
    values: Int[Array, "S"], begin: Int[Array, "S"], end: Int[Array, "S"], n: Int[Array, ""], bits: int
) -> Int[Array, "S"]:
    """Return the n-th smallest, from 0, of `values[begin:end]` for each of S ranges.

    A negative n gives 0, and an n beyond the range gives 2**bits - 1. `values` have `bits` bits. Values are sorted by
    one bit after the other, the highest first, and each range follows the half that holds its n-th value: O(S bits)
    operations, and memory for O(S) numbers. Source: Gagie, Puglisi and Turpin, "Range quantile queries: another virtue
    of wavelet trees" (SPIRE 2009).
    """
    index = jnp.arange(len(values), dtype=jnp.int32)

    def level(number, carry):
        values, begin, end, n, found = carry
        bit = bits - 1 - number
        low = (values >> bit) & 1 == 0
        lows = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(low, dtype=jnp.int32)])  # before each index
        low_begin, low_end = lows[begin], lows[end]
        is_low = n < low_end - low_begin
        begin = jnp.where(is_low, low_begin, lows[-1] + begin - low_begin)
        end = jnp.where(is_low, low_end, lows[-1] + end - low_end)
        n = jnp.where(is_low, n, n - (low_end - low_begin))
        place = jnp.where(low, lows[:-1], lows[-1] + index - lows[:-1])
        values = jnp.zeros_like(values).at[place].set(values, unique_indices=True)
        return values, begin, end, n, found + jnp.where(is_low, 0, jnp.int32(1) << bit)

    carry = values, begin, end, jnp.broadcast_to(n, begin.shape), jnp.zeros_like(begin)
    return lax.fori_loop(0, bits, level, carry)[-1]
