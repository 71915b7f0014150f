"""Keep all pairs, and read only the pages whose keys may match the query. Tang et al., "Quest", arXiv:2406.10774."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import LayerCache
from dms_jax.errors import ConfigError
from dms_jax.policies.cache_policy import FusedRule
from dms_jax.policies.keep_all import KeepAll


@dataclass(frozen=True)
class Quest(KeepAll):
    """Evict nothing, and let each decoded token read `budget // page_size` pages per KV head.

    The token reads its own page and the pages with the largest upper bounds on a product of query and key. The bounds
    follow from the minimum and maximum of each key channel in a page. `budget` limits the pairs that are read, not the
    pairs in the cache. As in the paper, a prefill reads everything and only decoding selects pages. To measure Quest on
    given text, chunks of up to one page count as decoding: each query selects its own pages, and also reads the pairs
    before it in the chunk.

    Deviations: pages are selected per KV head, by the largest bound among the query heads that share it (in the paper,
    each KV head has one query head). Every layer selects pages (the paper leaves the first two dense). Bounds are
    recomputed from the keys at each step, and pages are hidden by a mask, so this implementation measures the quality
    of Quest and not its speed.
    """

    has_budget: ClassVar[bool] = True
    reads_subset: ClassVar[bool] = True
    budget: int
    page_size: int = 16

    def __post_init__(self):
        if self.page_size < 1 or self.budget < 2 * self.page_size:
            raise ConfigError(
                "Quest must have a page_size >= 1 and a budget of at least two pages, "
                f"got pages of {self.page_size} and a budget of {self.budget}"
            )

    def fused_rule(self) -> FusedRule | None:
        return None  # the fused step reads all slots

    def pairs_read(self, live: Float[Array, "*A"]) -> Float[Array, "*A"]:
        return jnp.minimum(live, self.budget // self.page_size * self.page_size)

    def read(
        self, q: Float[Array, "B T N H"], slots: LayerCache, position: Int[Array, "B T"]
    ) -> Bool[Array, "B K T C"] | None:
        if q.shape[1] > self.page_size:
            return None
        occupied = slots.position < position[:, :1, None]
        page_of = jnp.where(occupied, slots.position // self.page_size, -1)  # -1: an empty slot
        pages = -(-slots.capacity // self.page_size)  # no pair leaves, so the slot of a pair is its position
        pad = pages * self.page_size - slots.capacity
        low, high = (self._bound(slots.k, page_of >= 0, pad, extreme) for extreme in (jnp.min, jnp.max))
        b, t, _, h = q.shape
        rows = q.reshape(b, t, low.shape[1], -1, h).transpose(0, 2, 1, 3, 4).astype(jnp.float32)  # [B K T G H]
        # The largest q.k of any key within the bounds: a positive channel of q takes the maximum, a negative one the
        # minimum.
        product = lambda x, y: jnp.einsum("bktgh,bkph->bktgp", x, y, precision=lax.Precision.HIGHEST)
        bound = jnp.max(product(jnp.maximum(rows, 0), high) + product(jnp.minimum(rows, 0), low), axis=3)
        filled = jnp.arange(pages)[None, None] * self.page_size < position[:, :1, None]
        own = jnp.arange(pages)[None, None] == position[..., None] // self.page_size
        bound = jnp.where(own[:, None], jnp.inf, jnp.where(filled[:, None], bound, -jnp.inf))
        rank = jnp.argsort(jnp.argsort(-bound, axis=-1), axis=-1)
        selected = jnp.repeat(rank < self.budget // self.page_size, self.page_size, axis=-1)
        return selected[..., : slots.capacity] & (page_of >= 0)[:, :, None]

    def _bound(
        self, k: Float[Array, "B K C H"], occupied: Bool[Array, "B K C"], pad: int, extreme
    ) -> Float[Array, "B K P H"]:
        """Return the smallest or largest value (`extreme`) of each channel in each page; 0 for an empty page."""
        fill = jnp.inf if extreme is jnp.min else -jnp.inf
        keys = jnp.where(occupied[..., None], k.astype(jnp.float32), fill)
        keys = jnp.pad(keys, ((0, 0), (0, 0), (0, pad), (0, 0)), constant_values=fill)
        bound = extreme(keys.reshape(*k.shape[:2], -1, self.page_size, k.shape[3]), axis=3)
        return jnp.where(jnp.abs(bound) == jnp.inf, 0.0, bound)
