"""The arms of an evaluation: a policy at a budget, and what that means for rows of a given length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dms_jax.config import ConfigError, nearest_name

if TYPE_CHECKING:  # loading them loads JAX, which a command does after its options are checked
    from dms_jax.models.decoder import Decoder
    from dms_jax.policies import CachePolicy

TRAINED = "trained"  # the budget of a learned policy as it is; for the others, as many live tokens as "dms" then held
LEARNED = ("dms", "immediate_eviction")
PROMPT = "prompt:"


@dataclass(frozen=True)
class Arm:
    """`budget`: pairs per KV head ("256"), a realised ratio ("cr4"), TRAINED, or "" for the dense model."""

    policy: str
    budget: str

    def __str__(self) -> str:
        return f"{self.policy}@{self.budget}" if self.budget else self.policy

    def pairs(self, length: int) -> int:
        """Live pairs that a row of `length` tokens may end with."""
        return round(length / float(self.budget[2:])) if self.budget.startswith("cr") else int(self.budget)


def parse_arms(policies: str, budgets: str) -> list[Arm]:
    """Both lists are separated by commas. "dms" comes first within a budget, since others may be told what it held."""
    from dms_jax.policies import POLICIES

    names = [name.strip() for name in policies.split(",") if name.strip()]
    for name in names:
        if (plain := name.removeprefix(PROMPT)) not in POLICIES:
            raise ConfigError(f"--policies: unknown policy {plain!r}; did you mean {nearest_name(plain, POLICIES)}?")
        if plain != name and plain in (*LEARNED, "dense", "quest"):
            raise ConfigError(f"--policies: {plain} does not rank pairs, so it cannot compress a prompt; leave {PROMPT} out")
    labels = [label.strip() for label in budgets.split(",") if label.strip()] or [TRAINED]
    for label in labels:
        number = label.removeprefix("cr")
        try:
            right = label == TRAINED or (float(number) >= 1 if label != number else label.isdecimal() and int(label) >= 1)
        except ValueError:
            right = False
        if not right:
            raise ConfigError(f'--budgets: {label!r} is none; give pairs per KV head ("256"), a ratio ("cr4") or "{TRAINED}"')
    ordered = sorted(dict.fromkeys(names), key=lambda name: name != "dms")
    if TRAINED in labels and "dms" not in ordered and any(name != "dense" for name in ordered):
        raise ConfigError(f'--budgets {TRAINED} means as many live tokens as dms keeps; add dms to --policies, or give --budgets "256" or "cr4"')
    arms = [Arm("dense", "")] if "dense" in ordered else []
    return arms + [Arm(name, label) for label in labels for name in ordered if name != "dense"]


@dataclass(frozen=True)
class Setting:
    """An arm, made concrete for rows of one length."""

    policy: CachePolicy
    threshold: float = 0.0


class Settings:
    """Makes arms concrete, calibrating each learned one once per (rows, ratio)."""

    def __init__(self, model: Decoder):
        self.model, self._thresholds = model, {}

    def of(self, arm: Arm, length: int, group: str, calibration: Callable[[], np.ndarray], held: Callable[[], float]) -> Setting:
        """`calibration` makes rows [rows, length] of the same kind as those to come, which `group` names. `held` says how many
        live pairs dms held as trained, a mean. Raises ConfigError."""
        from dms_jax.policies import policy_of

        if arm.policy == "dense":
            return Setting(policy_of(self.model.config, "dense"))
        if arm.policy in LEARNED:
            policy = policy_of(self.model.config, arm.policy)
            if arm.budget == TRAINED and arm.policy == "dms":
                return Setting(policy)
            pairs = held() if arm.budget == TRAINED else arm.pairs(length)
            key = arm, length, group
            if key not in self._thresholds:
                self._thresholds[key] = self._calibrate(policy, calibration(), length / pairs)
            return Setting(policy, self._thresholds[key])
        pairs = max(1, round(held())) if arm.budget == TRAINED else arm.pairs(length)
        return Setting(policy_of(self.model.config, f"{arm.policy}:{pairs}"))

    def _calibrate(self, policy: CachePolicy, rows: np.ndarray, target_cr: float) -> float:
        from dms_jax.calibration import calibrate
        from dms_jax.models.decoder import with_window

        return calibrate(with_window(self.model, policy.window_size), rows, target_cr, tolerance=0.005)
