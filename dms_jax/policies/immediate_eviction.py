"""DMS without its delay: the ablation of the paper (arXiv:2506.05345, "immediate eviction")."""

from dataclasses import dataclass

from dms_jax.policies.learned_eviction import LearnedEviction


@dataclass(frozen=True)
class ImmediateEviction(LearnedEviction):
    """A marked pair leaves at once: the learned policy with window 0. With `decision_shift` 1 that is when the next token
    has decided, which does not see the pair any more.

    Deviation: the paper trains a model for it; here it is the evict head that was trained with a window. To compare at equal
    live tokens, `calibrate` a threshold of its own.
    """

    @property
    def window_size(self) -> int:
        return 0
