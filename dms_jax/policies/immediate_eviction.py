"""DMS without its delay: the ablation of the paper (arXiv:2506.05345, "immediate eviction")."""

from dataclasses import dataclass

from dms_jax.policies.cache_policy import FusedRule
from dms_jax.policies.learned_eviction import LearnedEviction


@dataclass(frozen=True)
class ImmediateEviction(LearnedEviction):
    """Evict a marked pair at once: the learned policy with window 0.

    With `decision_shift` 1, the next token decides about a pair, and a pair that it marks is already invisible to it.
    Deviation: the paper trains a model for this policy; here the evict head was trained with a window. To compare both
    policies at equal numbers of live pairs, `calibrate` a separate threshold for this one.
    """

    @property
    def window_size(self) -> int:
        return 0

    def fused_rule(self) -> FusedRule | None:
        return None  # this ablation has not been measured with the fused kernel
