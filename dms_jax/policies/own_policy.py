"""Policies from outside of this package: what an object or a class must answer to be one, and what results call it."""

import re
from typing import Any

from dms_jax.config import ModelConfig
from dms_jax.errors import ConfigError, shown
from dms_jax.policies.cache_policy import CachePolicy

FOR_CLASSES = ("from_text", "check_compares_heads")  # asked of the class behind a name, never of a policy
MEMBERS = [name for name in vars(CachePolicy) if not name.startswith("_") and name not in FOR_CLASSES]


def checked(policy: Any) -> CachePolicy:
    """Return `policy` if it has all members of `CachePolicy` and can be static under jit. Raises ConfigError."""
    name = type(policy).__name__
    if missing := [member for member in MEMBERS if not hasattr(policy, member)]:
        raise ConfigError(
            f"policy must be a name or a CachePolicy, got {shown(policy)}, which has no {missing[0]}; "
            f"derive {name} from dms_jax.CachePolicy or dms_jax.BudgetPolicy"
        )
    try:
        hash(policy)
    except TypeError as why:
        raise ConfigError(
            f"policy {name} must be hashable, because compiled programs depend on it ({why}); write "
            f"@dataclass(frozen=True) above class {name}, and tuples instead of lists in its fields"
        ) from None
    return policy


def made(kind: type, config: ModelConfig, budget: int | None = None) -> CachePolicy:
    """Make a policy of a class, for a model of `config`, with a `budget` of pairs per KV head if the class has one.

    Raises ConfigError.
    """
    has_budget = getattr(kind, "has_budget", False)
    if has_budget and budget is None:
        raise ConfigError(f"policy {kind.__name__} needs a budget, in pairs per KV head; write {kind.__name__}(256)")
    try:
        if issubclass(kind, CachePolicy):
            return checked(kind.from_text(str(budget) if has_budget else "", config))
        return checked(kind(budget) if has_budget else kind())
    except TypeError as why:  # a method or an argument that is missing, which the message of Python names
        raise ConfigError(f"policy {kind.__name__} cannot be made: {why}") from None


def snake_case(name: str) -> str:
    """Return the name of a class as results print it: "KeepOld" is "keep_old"."""
    return re.sub(r"(?<=[a-zA-Z0-9])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", name).lower()
