"""The policy of a retrofitted model. Łańcucki et al., arXiv:2506.05345."""

from dataclasses import dataclass
from typing import ClassVar, Self

import jax.numpy as jnp
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.core import eviction
from dms_jax.core.compact_cache import Expiries
from dms_jax.core.visibility import expiry_of
from dms_jax.errors import ConfigError
from dms_jax.policies.cache_policy import CachePolicy, FusedRule, SlotBounds


def learned_config(config: ModelConfig) -> DMSConfig:
    """Return the parameters of a model's evict head. Raises ConfigError for a model without one."""
    if config.dms is None:
        raise ConfigError("the policy needs a retrofitted model, but this one has no evict head; load it with one")
    return config.dms


@dataclass(frozen=True)
class LearnedEviction(CachePolicy):
    """Evict each pair whose evict logit exceeds the threshold, `window_size` steps after the pair was added."""

    is_learned: ClassVar[bool] = True
    in_pages: ClassVar[bool] = True
    dms: DMSConfig

    @classmethod
    def from_text(cls, budget: str, config: ModelConfig) -> Self:
        if budget:
            raise ConfigError(
                f"the policy has a threshold and no budget, got {budget!r}; leave it out, or use dms_budget:{budget}"
            )
        return cls(learned_config(config))

    @property
    def window_size(self) -> int:
        return self.dms.window_size

    def slot_bounds(self) -> SlotBounds:
        return SlotBounds(
            self.window_size + 1, None, f"a window of {self.window_size} (window_size + 1 pairs always stay)"
        )

    def fused_rule(self) -> FusedRule | None:
        return FusedRule(self.window_size, self.dms.decision_shift, self.dms.granularity)

    def mark(
        self,
        logits: Float[Array, "B K T"],
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
        threshold: float | Float[Array, ""],
    ) -> Expiries:
        real = (jnp.arange(position.shape[1])[None] < count[:, None])[:, None]
        scores = jnp.where(real, eviction.share_heads(logits, self.dms.granularity), 0.0)
        evict = real & eviction.decide(logits, self.dms.granularity, threshold)
        # The pair before the chunk comes first: with shift 1, the chunk's first token decides about it.
        before = lambda x, fill: jnp.concatenate([jnp.full_like(x[..., :1], fill), x], axis=-1)
        score = eviction.align_to_pairs(before(scores, 0.0), self.dms.decision_shift, 0.0)
        marked = eviction.align_to_pairs(before(evict, False), self.dms.decision_shift, False)
        pairs = jnp.concatenate([position[:, :1] - 1, position], axis=1)[:, None]
        expiry = expiry_of(marked, pairs, self.window_size)
        if self.dms.decision_shift == 0:
            return Expiries(expiry[..., 1:], score[..., 1:], None, None)
        return Expiries(expiry[..., 1:], score[..., 1:], expiry[..., 0], score[..., 0])
