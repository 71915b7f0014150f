"""The arms of an evaluation: a policy at a budget, and what that means for rows of a given length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dms_jax.errors import ConfigError, suggestion
from dms_jax.evaluation.results import arm_name

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
        return arm_name({"policy": self.policy, "budget": self.budget})

    def pairs(self, length: int) -> int:
        """Live pairs that a row of `length` tokens may end with."""
        return round(length / float(self.budget[2:])) if self.budget.startswith("cr") else int(self.budget)


def parse_arms(policies: str, budgets: str) -> list[Arm]:
    """Both lists are separated by commas. "dms" comes first within a budget, since others may be told what it held."""
    from dms_jax.policies import POLICIES

    names = [name.strip() for name in policies.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--policies is empty; give some of {', '.join(POLICIES)}")
    for name in names:
        if (plain := name.removeprefix(PROMPT)) not in POLICIES:
            raise ConfigError(f"--policies: unknown policy {plain!r}; {suggestion(plain, POLICIES)}")
        if plain != name and plain in (*LEARNED, "dense", "quest"):
            raise ConfigError(
                f"--policies: {plain} does not rank pairs, so it cannot compress a prompt; leave {PROMPT} out"
            )
    labels = [label.strip() for label in budgets.split(",") if label.strip()] or [TRAINED]
    for label in labels:
        number = label.removeprefix("cr")
        try:
            right = label == TRAINED or (
                1 <= float(number) < float("inf") if label != number else label.isdecimal() and int(label) >= 1
            )
        except ValueError:
            right = False
        if not right:
            raise ConfigError(
                f'--budgets: {label!r} is none; give pairs per KV head ("256"), a ratio ("cr4") or "{TRAINED}"'
            )
    ordered = sorted(dict.fromkeys(names), key=lambda name: name != "dms")
    if TRAINED in labels and "dms" not in ordered and any(name != "dense" for name in ordered):
        raise ConfigError(
            f'--budgets {TRAINED} means as many live tokens as dms keeps; add dms to --policies, or give --budgets "256" or "cr4"'
        )
    arms = [Arm("dense", "")] if "dense" in ordered else []
    return arms + [Arm(name, label) for label in labels for name in ordered if name != "dense"]


def check_learned(model: Decoder, policies: Iterable[str], where: str) -> None:
    """Learned policies are of a retrofitted model; `where` names the one at hand. Raises ConfigError."""
    if model.config.dms is None and (learned := [policy for policy in policies if policy in LEARNED]):
        raise ConfigError(
            f"--policies {learned[0]}: {where} has no eviction policy; give a retrofitted folder, or --adapter FILE"
        )


@dataclass(frozen=True)
class Setting:
    """An arm, made concrete for rows of one length."""

    policy: CachePolicy
    threshold: float = 0.0


def check_arm(model: Decoder, arm: Arm, length: int) -> None:
    """Refuse, before anything is measured, what rows of `length` tokens cannot have. Raises ConfigError."""
    from dms_jax.core.cr_schedule import realised_cr
    from dms_jax.policies import policy_of

    if arm.policy == "dense" or arm.budget == TRAINED:
        return
    pairs = arm.pairs(length)
    if not 1 <= pairs <= length:
        raise ConfigError(
            f"--budgets {arm.budget} is {pairs} pairs of rows of {length} tokens; give 1 to {length}, or cr1 to cr{length}"
        )
    if arm.policy not in LEARNED:
        policy_of(model.config, f"{arm.policy}:{pairs}")
        return
    window = policy_of(model.config, arm.policy).window_size
    highest = realised_cr(math.inf, length, window)
    if length / pairs > highest:
        raise ConfigError(
            f"{arm} means CR {length / pairs:.4g}, but rows of {length} tokens under a window of {window} reach at most {highest:.4g}; "
            f"use longer rows, or a budget of {math.ceil(length / highest)} pairs or more"
        )


class Settings:
    """Makes arms concrete, calibrating each learned one once per (rows, ratio)."""

    def __init__(self, model: Decoder):
        self.model, self._thresholds = model, {}

    def dense(self) -> Setting:
        from dms_jax.policies import policy_of

        return Setting(policy_of(self.model.config, "dense"))

    def of(
        self, arm: Arm, length: int, group: str, calibration: Callable[[], np.ndarray], held: Callable[[], float | None]
    ) -> Setting:
        """`calibration` makes rows [rows, length] of the same kind as those to come, which `group` names. `held` says how many
        live pairs dms held there, where the others are to hold as many. Raises ConfigError."""
        from dms_jax.policies import policy_of

        if arm.policy == "dense":
            return self.dense()
        if arm.policy in LEARNED:
            policy = policy_of(self.model.config, arm.policy)
            if arm.budget == TRAINED and arm.policy == "dms":
                return Setting(policy)
            pairs = self._as_many(arm, length, held) if arm.budget == TRAINED else arm.pairs(length)
            key = arm, length, group
            if key not in self._thresholds:
                self._thresholds[key] = self._calibrate(policy, calibration(), length / pairs)
            return Setting(policy, self._thresholds[key])
        pairs = max(1, round(self._as_many(arm, length, held)))
        return Setting(policy_of(self.model.config, f"{arm.policy}:{pairs}"))

    def _as_many(self, arm: Arm, length: int, held: Callable[[], float | None]) -> float:
        same = None if arm.policy == "dms" else held()
        if same is None and arm.budget == TRAINED:
            raise ConfigError(f"{arm} needs to know what dms held; measure dms first, in the same file")
        return arm.pairs(length) if same is None else same

    def _calibrate(self, policy: CachePolicy, rows: np.ndarray, target_cr: float) -> float:
        from dms_jax.engine.calibration import calibrate
        from dms_jax.models.decoder import with_window

        return calibrate(with_window(self.model, policy.window_size), rows, target_cr, tolerance=0.005)
