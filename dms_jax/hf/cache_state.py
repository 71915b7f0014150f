"""Check what a cache file holds against what a cache can hold: a file whose hash is right may still have been edited.

Wrong positions or expiries would not fail, but attend to other pairs. Errors are `ConfigError`.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from dms_jax.core.compact_cache import EMPTY, NEVER_VISIBLE
from dms_jax.core.visibility import NEVER
from dms_jax.errors import ConfigError
from dms_jax.policies import CachePolicy, describe
from dms_jax.policies.cache_policy import UNBOUNDED

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))  # of keys and values
DTYPES = {
    "position": np.int32,
    "expiry": np.int32,
    "score": np.float32,
    "forced_evictions": np.int32,
    "budget": np.int32,
}


def check_policy(policy: CachePolicy) -> None:
    """Refuse numbers of a policy that do not fit into positions."""
    for name, value in describe(policy).items():
        if isinstance(value, int) and abs(value) > UNBOUNDED:
            raise ConfigError(f"{name} of the policy must be at most {UNBOUNDED}, got {value}")


def check_seen(seen: np.ndarray, limit: int) -> None:
    """Refuse a number of tokens that no row of the model can have."""
    if seen.dtype != np.int32 or ((seen < 0) | (seen > limit)).any():
        raise ConfigError(f"seen must be whole numbers from 0 to {limit}, this model's context, got {seen.tolist()}")


def check_layer(layer: Mapping[str, np.ndarray], seen: np.ndarray, policy: CachePolicy) -> None:
    """Refuse a layer [B K C ...] whose tensors contradict each other, the tokens `seen` [B] or the policy."""
    dtypes = DTYPES | {"k": layer["v"].dtype, "v": layer["k"].dtype, "statistic": np.float32, "head_state": np.float32}
    for name, tensor in layer.items():
        if tensor.dtype != dtypes[name] or (name == "k" and tensor.dtype not in FLOATS):
            raise ConfigError(f"{name} has dtype {tensor.dtype}")
    position, expiry, forced = layer["position"], layer["expiry"], layer["forced_evictions"]
    rows, empty = seen[:, None, None], position == EMPTY
    wrong = {
        "position must be in [0, seen)": ~empty & ((position < 0) | (position >= rows)),
        "expiry must not be set in an empty slot": empty & (expiry != NEVER_VISIBLE),
        "expiry must not be before its position": ~empty & (expiry != NEVER_VISIBLE) & (expiry < position),
        "forced_evictions must be in [0, seen]": (forced < 0) | (forced > seen[:, None]),
    }
    live = ~empty & (expiry >= rows - 1)
    for name in ("k", "v", "score"):  # a slot that is not live may hold anything, because nothing reads it
        wrong[f"{name} must be finite"] = live & ~_finite(layer[name])
    if "head_state" in layer:
        wrong["head_state must be finite"] = ~np.isfinite(layer["head_state"]).all(axis=-1)
    places = np.sort(np.where(live, position, -1 - np.arange(position.shape[-1], dtype=np.int32)), axis=-1)
    wrong["position must be different in each live slot"] = places[..., 1:] == places[..., :-1]
    if policy.is_learned:
        # The policy decides once for each pair, and whatever it decides, the pairs of the window stay.
        leaves = position.astype(np.int64) + policy.window_size
        if "budget" in layer:
            leaves, held = NEVER, np.minimum(seen[:, None], layer["budget"])
            wrong["budget must be at least window_size + 1"] = layer["budget"] <= policy.window_size
            wrong["live pairs must fill the budget"] = (live.sum(-1) != held) & (forced == 0)
        wrong["expiry must be position + window_size or never"] = live & (expiry != NEVER) & (expiry != leaves)
        recent = live & (position >= rows - 1 - policy.window_size)
        window = np.minimum(seen, policy.window_size + 1)[:, None]
        wrong["the pairs of the window must be there"] = (recent.sum(-1) < window) & (forced == 0)
        wrong["the newest pair must be there"] = ~(live & (position == rows - 1)).any(-1) & (seen > 0)[:, None]
    for rule, where in wrong.items():
        if where.any():
            row, head = np.argwhere(where)[0][:2]
            raise ConfigError(f"row {row}, KV head {head}: {rule}")


def _finite(tensor: np.ndarray) -> np.ndarray:
    """Return which slots [B K C] hold finite numbers only."""
    return np.asarray(np.isfinite(tensor).all(axis=tuple(range(3, tensor.ndim))))
