"""Read less, keep all: pages of keys that the query may care about. Tang et al., "Quest", arXiv:2406.10774."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import LayerCache
from dms_jax.errors import ConfigError
from dms_jax.policies.keep_all import KeepAll


@dataclass(frozen=True)
class Quest(KeepAll):
    """Nothing leaves. A decoded token reads `budget // page_size` pages per KV head: its own, and those whose keys, by their
    channel-wise minimum and maximum, allow the largest product with it. `budget` bounds the pairs read, not those held.

    As in the paper a prefill reads everything; only decoding chooses, one token at a time or, to measure it on given text, a few:
    each query of a chunk of at most a page chooses for itself and reads what precedes it in the chunk besides. Deviations: pages are chosen per
    KV head, by the largest bound among the query heads that share it (the paper has one query head each); every layer
    chooses (the paper leaves the first two dense); bounds are formed anew from the keys at each step and pages are hidden by
    a mask, so this measures what Quest loses, not what it saves.
    """

    reads_subset = True
    has_budget = True

    budget: int
    page_size: int = 16

    def __post_init__(self):
        if self.page_size < 1 or self.budget < 2 * self.page_size:
            raise ConfigError(
                f"Quest wants page_size >= 1 and a budget >= two pages; got pages of {self.page_size} and a budget of {self.budget}"
            )

    def pairs_read(self, live: Float[Array, "*A"]) -> Float[Array, "*A"]:
        return jnp.minimum(live, self.budget // self.page_size * self.page_size)

    def read(
        self, q: Float[Array, "B T N H"], slots: LayerCache, position: Int[Array, "B T"]
    ) -> Bool[Array, "B K T C"] | None:
        if q.shape[1] > self.page_size:
            return None
        page_of = jnp.where(
            slots.position < position[:, :1, None], slots.position // self.page_size, -1
        )  # -1: not there
        pages = -(-slots.capacity // self.page_size)  # nothing leaves, so the slot of a pair is its position
        pad = pages * self.page_size - slots.capacity
        low, high = (self._bound(slots.k, page_of >= 0, pad, extreme) for extreme in (jnp.min, jnp.max))
        b, t, _, h = q.shape
        rows = q.reshape(b, t, low.shape[1], -1, h).transpose(0, 2, 1, 3, 4).astype(jnp.float32)  # [B K T G H]
        # The largest q.k that keys between the bounds allow: each channel takes the bound of its own sign.
        product = lambda x, y: jnp.einsum("bktgh,bkph->bktgp", x, y, precision=lax.Precision.HIGHEST)
        bound = jnp.max(product(jnp.maximum(rows, 0), high) + product(jnp.minimum(rows, 0), low), axis=3)
        filled = jnp.arange(pages) * self.page_size < position[:, :1, None]
        own = jnp.arange(pages) == position[..., None] // self.page_size
        bound = jnp.where(own[:, None], jnp.inf, jnp.where(filled[:, None], bound, -jnp.inf))
        rank = jnp.argsort(jnp.argsort(-bound, axis=-1), axis=-1)
        chosen = jnp.repeat(rank < self.budget // self.page_size, self.page_size, axis=-1)
        return chosen[..., : slots.capacity] & (page_of >= 0)[:, :, None]

    def _bound(
        self, k: Float[Array, "B K C H"], there: Bool[Array, "B K C"], pad: int, extreme
    ) -> Float[Array, "B K P H"]:
        """The smallest or largest value of each channel in each page; 0 for a page with nothing in it."""
        fill = jnp.inf if extreme is jnp.min else -jnp.inf
        keys = jnp.where(there[..., None], k.astype(jnp.float32), fill)
        keys = jnp.pad(keys, ((0, 0), (0, 0), (0, pad), (0, 0)), constant_values=fill)
        bound = extreme(keys.reshape(*k.shape[:2], -1, self.page_size, k.shape[3]), axis=3)
        return jnp.where(jnp.abs(bound) == jnp.inf, 0.0, bound)
