"""Divide a mean budget of pairs among the heads of a model, without training.

All heads get one common threshold, as under the policy `dms`: the one at which calibration rows keep the mean budget.
The budget of each head is the number of pairs that it then keeps. Errors are `ConfigError`.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.engine.calibration import check_rows
from dms_jax.engine.decoding import select_policy
from dms_jax.errors import ConfigError
from dms_jax.hf.folder import Source
from dms_jax.hf.head_budget_file import load_head_shares
from dms_jax.models.decoder import Decoder
from dms_jax.models.parameters import jitted
from dms_jax.policies import CachePolicy
from dms_jax.policies.budgeted_eviction import BudgetedEviction, HeadBudgets
from dms_jax.policies.head_shares import HeadShares

MEANS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of settled pairs, for budgets that are not known beforehand


def head_budgets(model: Decoder, tokens: Int[Array, "B T"], pairs: int, *, passes: int = 3) -> HeadBudgets:
    """Return budgets for the layers and KV heads of `model` whose mean is `pairs`, as `BudgetedEviction` takes them.

    `tokens` are calibration rows of the length for which the budgets are meant. Budgets are at least window_size + 1
    and at most T, unless `pairs` is larger. Evictions change the logits of the layers above, so the rows run `passes`
    times: the first time densely, and then under the budgets that the logits of the pass before gave.
    """
    dms, tokens = check_rows(model, tokens, "head_budgets")
    length, settled = tokens.shape[1], tokens.shape[1] - dms.window_size - 1
    BudgetedEviction(dms, pairs)  # refuses a budget below the window
    if pairs >= length or settled < 1:
        return ((pairs,) * model.config.num_kv_heads,) * model.config.num_layers
    shares = head_shares(model, tokens, ((pairs - dms.window_size - 1) / settled,), passes=passes)
    return shares.budgets(pairs, length, dms.window_size)


def head_shares(
    model: Decoder, tokens: Int[Array, "B T"], means: tuple[float, ...] = MEANS, *, passes: int = 3
) -> HeadShares:
    """Measure the shares of settled pairs that heads keep if they keep `means` of them on average, which increase.

    Shares serve any budget and any length of rows. `tokens` and `passes` are as in `head_budgets`.
    """
    dms, tokens = check_rows(model, tokens, "head_shares")
    length, shape = tokens.shape[1], (model.config.num_layers, model.config.num_kv_heads)
    settled = length - dms.window_size - 1
    if settled < 1:
        raise ConfigError(
            f"calibration rows must have more than window_size + 1 = {dms.window_size + 1} tokens, got {length}; "
            "use longer rows"
        )
    run, shares = jitted(model, "budgeted_hidden"), []
    for mean in means:
        share = np.ones(shape)
        for _ in range(passes):
            table = dms.window_size + 1 + np.round(share * settled).astype(np.int32)
            score = np.asarray(run(tokens, table)[2])[..., :settled]
            share = _shares_at_common_threshold(score, round(mean * score.size))
        shares.append(share)
    return HeadShares.between_edges(np.stack(shares))


def shares_of(score: Float[np.ndarray, "L B K n"], means: tuple[float, ...] = MEANS) -> HeadShares:
    """Return the shares that heads keep of settled pairs with the evict logits `score`, taking the logits as given."""
    shares = [_shares_at_common_threshold(score, round(mean * score.size)) for mean in means]
    return HeadShares.between_edges(np.stack(shares))


def policy_for_rows(model: Decoder, policy: CachePolicy | str | None, dense: bool, length: int) -> CachePolicy:
    """Resolve the arguments `policy` and `dense` of `GenerationConfig` for rows of at most `length` tokens.

    A name such as "dms_budget:256" gets the budgets of heads that the model's folder brings (`hf.head_budget_file`).
    """
    chosen, source = select_policy(model.config, policy, dense), getattr(model, "source", None)
    if not isinstance(policy, str) or not isinstance(chosen, BudgetedEviction) or not isinstance(source, Source):
        return chosen
    shares = load_head_shares(source.path, model.config)
    if shares is None:
        return chosen
    return replace(chosen, head_budgets=shares.budgets(chosen.budget, length, chosen.window_size))


def _shares_at_common_threshold(score: Float[np.ndarray, "L B K n"], kept: int) -> Float[np.ndarray, "L K"]:
    """Return the share of each head's pairs among the `kept` lowest scores of all; equal scores share what is left."""
    if kept == 0:
        return np.zeros((score.shape[0], score.shape[2]))
    threshold = np.partition(score, kept - 1, axis=None)[kept - 1]
    below, tied = score < threshold, score == threshold
    part = (kept - below.sum()) / tied.sum()
    return (below + part * tied).mean(axis=(1, 3))
