"""`head_budgets.json` in a model's folder: how the policy `dms_budget:N` divides any N among the model's heads.

Without the file, all heads get N pairs. Errors are `ConfigError`.
"""

import os

import numpy as np

from dms_jax.config import ModelConfig
from dms_jax.errors import ConfigError, naming
from dms_jax.files import read_json, write_json
from dms_jax.policies.head_shares import HeadShares

HEAD_BUDGETS = "head_budgets.json"


def save_head_shares(folder: str | os.PathLike[str], shares: HeadShares, window_size: int) -> None:
    """Write shares that were measured with a window of `window_size` into an exported folder."""
    measured = np.round(shares.share[1:-1], 6).tolist()  # without the two ends, which hold for every model
    write_json(os.path.join(folder, HEAD_BUDGETS), {"window_size": window_size, "shares": measured}, indent=None)


def load_head_shares(folder: str | os.PathLike[str], config: ModelConfig) -> HeadShares | None:
    """Read the shares for a model of `config`; None if its folder has none, or is a single file."""
    path = os.path.join(folder, HEAD_BUDGETS)
    if not os.path.isfile(path):
        return None
    content = read_json(path)
    with naming(path):
        window = config.require_dms().window_size
        if content.keys() != {"window_size", "shares"} or content["window_size"] != window:
            raise ConfigError(
                f"the file must hold shares measured with this model's window of {window}, "
                f"got window_size {content.get('window_size')!r}; delete it, or measure again"
            )
        try:
            shares = np.asarray(content["shares"], np.float64)
        except (TypeError, ValueError):  # text, or lists of different lengths
            shares = np.zeros(0)
        shape = config.num_layers, config.num_kv_heads
        if shares.ndim != 3 or not len(shares) or shares.shape[1:] != shape:
            raise ConfigError(f"shares must be lists of {shape[1]} numbers for each of {shape[0]} layers; delete it")
        found = HeadShares.between_edges(shares)
        if not ((shares >= 0) & (shares <= 1)).all() or (np.diff(found.mean) <= 0).any():
            raise ConfigError("shares must be from 0 to 1, with means that increase; delete the file")
    return found
