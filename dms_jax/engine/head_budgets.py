"""Divide a mean budget of pairs among the heads of a model, without training.

All heads get one common threshold, as under the policy `dms`: the one at which calibration rows keep the mean budget.
The budget of each head is the number of pairs that it then keeps. Errors are `ConfigError`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.engine.calibration import check_rows
from dms_jax.errors import ConfigError
from dms_jax.models.decoder import Decoder
from dms_jax.models.parameters import jitted
from dms_jax.policies.budgeted_eviction import BudgetedEviction, HeadBudgets


class HeadShares(NamedTuple):
    """Shares of its settled pairs, those outside the window, that each head keeps when all heads keep a mean of them.

    Both arrays begin with 0 and end with 1, so that shares between two means follow by interpolation.
    """

    mean: Float[np.ndarray, "n"]
    share: Float[np.ndarray, "n L K"]

    def budgets(self, pairs: int, length: int, window_size: int) -> HeadBudgets:
        """Return the budgets of heads with the mean `pairs`, for rows of `length` tokens."""
        settled = length - window_size - 1
        if pairs >= length or settled < 1:
            return ((pairs,) * self.share.shape[2],) * self.share.shape[1]
        mean = (pairs - window_size - 1) / settled
        flat = self.share.reshape(len(self.mean), -1)
        share = np.array([np.interp(mean, self.mean, of_head) for of_head in flat.T])
        kept = _largest_remainder(share * settled, (pairs - window_size - 1) * len(share))
        table = (window_size + 1 + kept).reshape(self.share.shape[1:])
        return tuple(tuple(layer) for layer in table.tolist())


def head_budgets(model: Decoder, tokens: Int[Array, "B T"], pairs: int, *, passes: int = 3) -> HeadBudgets:
    """Return budgets for the layers and KV heads of `model` whose mean is `pairs`, as `BudgetedEviction` takes them.

    `tokens` are calibration rows of the length for which the budgets are meant. Budgets are at least window_size + 1
    and at most T, unless `pairs` is larger. Evictions change the logits of the layers above, so the rows run `passes`
    times: the first time densely, and then under the budgets that the logits of the pass before gave.
    """
    dms, tokens = check_rows(model, tokens, "head_budgets")
    length, window = tokens.shape[1], dms.window_size
    BudgetedEviction(dms, pairs)  # refuses a budget below the window
    settled = length - window - 1
    if pairs >= length or settled < 1:
        return ((pairs,) * model.config.num_kv_heads,) * model.config.num_layers
    return head_shares(model, tokens, ((pairs - window - 1) / settled,), passes=passes).budgets(pairs, length, window)


def head_shares(model: Decoder, tokens: Int[Array, "B T"], means: tuple[float, ...], *, passes: int = 3) -> HeadShares:
    """Measure the shares of settled pairs that heads keep at each of `means`; `passes` as in `head_budgets`."""
    dms, tokens = check_rows(model, tokens, "head_shares")
    rows, length = tokens.shape
    settled, shape = length - dms.window_size - 1, (model.config.num_layers, model.config.num_kv_heads)
    if settled < 1:
        raise ConfigError(
            f"calibration rows must be longer than the window of {dms.window_size} + 1 tokens, got {length} tokens; "
            "use longer rows"
        )
    run, shares = jitted(model, "budgeted_hidden"), []
    for mean in means:
        table = np.full(shape, length, np.int32)
        for _ in range(passes):
            score = np.asarray(run(tokens, table)[2])[..., :settled]
            share = _shares_at_common_threshold(score, round(mean * score.size))
            table = dms.window_size + 1 + np.round(share * settled).astype(np.int32)
        shares.append(share)
    share = np.stack([np.zeros(shape), *shares, np.ones(shape)])
    return HeadShares(share.mean(axis=(1, 2)), share)


def _shares_at_common_threshold(score: Float[np.ndarray, "L B K n"], kept: int) -> Float[np.ndarray, "L K"]:
    """Return the share of each head's pairs among the `kept` lowest scores of all; equal scores share what is left."""
    if kept == 0:
        return np.zeros((score.shape[0], score.shape[2]))
    threshold = np.partition(score, kept - 1, axis=None)[kept - 1]
    below, tied = score < threshold, score == threshold
    part = (kept - below.sum()) / tied.sum()
    return (below + part * tied).mean(axis=(1, 3))


def _largest_remainder(counts: Float[np.ndarray, "n"], total: int) -> Int[np.ndarray, "n"]:
    """Round `counts`, whose sum is `total` up to rounding errors, to whole numbers whose sum is `total`."""
    counts = np.round(counts, 6)
    whole = np.floor(counts).astype(np.int64)
    first = np.argsort(whole - counts, kind="stable")[: total - whole.sum()]
    whole[first] += 1
    return whole
