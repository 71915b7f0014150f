"""The policy of a retrofitted model. Łańcucki et al., arXiv:2506.05345."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.config import DMSConfig
from dms_jax.core import eviction
from dms_jax.core.compact_cache import Expiries
from dms_jax.core.visibility import expiry_of
from dms_jax.policies.cache_policy import CachePolicy, SlotBounds


@dataclass(frozen=True)
class LearnedEviction(CachePolicy):
    """A pair whose evict logit exceeds the threshold leaves `window_size` steps after it came."""

    is_learned = True

    dms: DMSConfig

    @property
    def window_size(self) -> int:
        return self.dms.window_size

    def slot_bounds(self) -> SlotBounds:
        return SlotBounds(
            self.window_size + 1, None, f"a window of {self.window_size} (window_size + 1 pairs always stay)"
        )

    def mark(
        self,
        logits: Float[Array, "B K T"],
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
        threshold: float | Float[Array, ""],
    ) -> Expiries:
        real = (jnp.arange(position.shape[1]) < count[:, None])[:, None]
        scores = jnp.where(real, eviction.share_heads(logits, self.dms.granularity), 0.0)
        evict = real & eviction.decide(logits, self.dms.granularity, threshold)
        # One pair more, the one before the chunk: with shift 1 the first token decides about it.
        before = lambda x, fill: jnp.concatenate([jnp.full_like(x[..., :1], fill), x], axis=-1)
        score = eviction.align_to_pairs(before(scores, 0.0), self.dms.decision_shift, 0.0)
        marked = eviction.align_to_pairs(before(evict, False), self.dms.decision_shift, False)
        pairs = jnp.concatenate([position[:, :1] - 1, position], axis=1)[:, None]
        expiry = expiry_of(marked, pairs, self.window_size)
        if self.dms.decision_shift == 0:
            return Expiries(expiry[..., 1:], score[..., 1:], None, None)
        return Expiries(expiry[..., 1:], score[..., 1:], expiry[..., 0], score[..., 0])
