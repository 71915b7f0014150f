"""Divide a mean budget of pairs among heads, by the shares that each head keeps of its own pairs."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dms_jax.policies.budgeted_eviction import HeadBudgets


class HeadShares(NamedTuple):
    """Shares of its settled pairs, those outside the window, that each head keeps, for several means over all heads.

    Means increase from 0, where all shares are 0, to 1, where all are 1. Shares for a mean between two of them follow
    by interpolation.
    """

    share: Float[np.ndarray, "n L K"]

    @property
    def mean(self) -> Float[np.ndarray, "n"]:
        """The mean over layers and heads of each of the n rows."""
        return self.share.mean(axis=(1, 2))

    @staticmethod
    def between_edges(shares: Float[np.ndarray, "n L K"]) -> "HeadShares":
        """Add the two ends, at which heads keep nothing and everything, to measured shares."""
        edge = np.zeros((1, *shares.shape[1:]))
        return HeadShares(np.concatenate([edge, shares, edge + 1]))

    def budgets(self, pairs: int, length: int, window_size: int) -> HeadBudgets:
        """Return budgets of heads with the mean `pairs`, for rows of `length` tokens; equal ones if nothing leaves."""
        settled, (_, layers, heads) = length - window_size - 1, self.share.shape
        if pairs >= length or settled < 1:
            return ((pairs,) * heads,) * layers
        mean, means = (pairs - window_size - 1) / settled, self.mean
        kept = np.array([np.interp(mean, means, of_head) for of_head in self.share.reshape(len(means), -1).T]) * settled
        table = window_size + 1 + _largest_remainder(kept, (pairs - window_size - 1) * len(kept))
        return tuple(tuple(layer) for layer in table.reshape(layers, heads).tolist())


def _largest_remainder(counts: Float[np.ndarray, "n"], total: int) -> Int[np.ndarray, "n"]:
    """Round `counts`, whose sum is `total` up to rounding errors, to whole numbers whose sum is `total`."""
    counts = np.round(counts, 6)
    whole = np.floor(counts).astype(np.int64)
    whole[np.argsort(whole - counts, kind="stable")[: total - whole.sum()]] += 1
    return whole
