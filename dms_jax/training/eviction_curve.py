"""The cost of evicting pairs, to second order, as a function of the compression ratio: the proxy of `inspect`.

Half of the Fisher information of a pair's gate (`fisher_init.gate_information`) is the KL in nats that evicting this
pair alone costs. The proxy of a set of pairs is the sum over the set, per token. It ignores that evicted pairs make
each other more expensive, so it lies far below the KL that is measured, but it orders rules and ratios as the KL does.
All functions work on the pairs that can leave their row: `cost` and `score` are [L K n], with n of them in each head.
"""

import numpy as np
from jaxtyping import Bool, Float


def pairs_to_evict(cr: float, num_rows: int, length: int) -> int:
    """Return how many pairs each KV head must evict, on average, for rows to realise the ratio `cr` at their end."""
    return round(num_rows * length * (1 - 1 / cr))


def highest_scores(score: Float[np.ndarray, "L K n"], number: int) -> Bool[np.ndarray, "L K n"]:
    """Mark the `number` pairs per head with the highest scores of all, as one common threshold does."""
    return _highest(score.reshape(1, -1), number * score.shape[0] * score.shape[1]).reshape(score.shape)


def highest_scores_per_head(score: Float[np.ndarray, "L K n"], number: int) -> Bool[np.ndarray, "L K n"]:
    """Mark the `number` pairs of each head with its highest scores, as equal budgets do."""
    return _highest(score.reshape(-1, score.shape[-1]), number).reshape(score.shape)


def proxy(cost: Float[np.ndarray, "L K n"], evicted: Bool[np.ndarray, "L K n"], num_tokens: int) -> float:
    """Return the proxy of the KL in nats per token: half of the `cost` of the evicted pairs, over `num_tokens`."""
    return 0.5 * float(np.sum(cost, where=evicted, dtype=np.float64)) / num_tokens


def _highest(score: Float[np.ndarray, "R n"], number: int) -> Bool[np.ndarray, "R n"]:
    """Mark exactly `number` of the highest scores of each row. Of equal scores, any may be marked."""
    evicted = np.zeros(score.shape, bool)
    if number:
        np.put_along_axis(evicted, np.argpartition(-score, number - 1, axis=1)[:, :number], True, axis=1)
    return evicted
