"""The methods that an evaluation compares. A method is a policy at a budget; this module says what the budget means for
rows of a given length."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dms_jax.config import ModelConfig
from dms_jax.core.cr_schedule import realised_cr
from dms_jax.engine.calibration import calibrate
from dms_jax.engine.head_budgets import head_budgets
from dms_jax.errors import ConfigError, naming, suggestion
from dms_jax.evaluation.result_records import method_name
from dms_jax.models.decoder import Decoder, with_window
from dms_jax.policies import POLICIES, BudgetedEviction, CachePolicy, policy_name, policy_of
from dms_jax.policies.budgeted_eviction import HeadBudgets
from dms_jax.policies.own_policy import made

DENSE = "dense"  # the reference: no budget
DMS = "dms"  # at the budget TRAINED, the other policies match the live tokens of this one
TRAINED = "trained"  # dms uses the threshold that it was trained for; the others keep as many live tokens as dms did
PROMPT = "prompt:"  # begins the name of a policy that ranks once, after the prompt
ADAKV = "adakv:"  # after it, if both: begins the name of a policy under which the heads of a layer share their budgets


@dataclass(frozen=True)
class Method:
    """A policy at a budget: pairs per KV head ("256"), a realised CR ("cr4"), TRAINED, or "" for the dense model and
    for a class that has no budget."""

    policy: str
    budget: str
    own: type[CachePolicy] | None = None  # the class, if it was given in place of a name; then `policy` is its name

    def __str__(self) -> str:
        return method_name(self.policy, self.budget)

    @property
    def kind(self) -> type[CachePolicy]:
        return self.own or POLICIES[self.policy.removeprefix(PROMPT).removeprefix(ADAKV)]

    @property
    def needs_calibration(self) -> bool:
        """Whether other rows decide its threshold or its budgets of heads."""
        return self.kind.is_learned and (self.kind.has_budget or self.budget != TRAINED)

    @property
    def compresses_prompt(self) -> bool:
        return self.policy.startswith(PROMPT)

    def policy_with(self, config: ModelConfig, pairs: int | None = None) -> CachePolicy:
        """Make the policy for a model of `config`, with a budget of `pairs` per KV head if the method has one."""
        if self.own is not None:
            return made(self.own, config, pairs)
        return policy_of(config, self.policy if pairs is None else f"{self.policy}:{pairs}")

    def pairs(self, length: int) -> int:
        """Return the number of live pairs with which a row of `length` tokens may end."""
        return round(length / float(self.budget[2:])) if self.budget.startswith("cr") else int(self.budget)


def parse_methods(policies: str | Sequence[str | type[CachePolicy]], budgets: str) -> list[Method]:
    """Combine every policy with every budget.

    `policies` are comma-separated names, or a list of names and classes; `budgets` are comma-separated. Within a budget
    dms comes first, since the others may have to match its live tokens.
    """
    given = policies.split(",") if isinstance(policies, str) else policies
    own = {policy_name(policy): policy for policy in given if isinstance(policy, type)}
    names = [name.strip() if isinstance(name, str) else policy_name(name) for name in given]
    names = [name for name in names if name]
    if not names:
        raise ConfigError(f"--policies is empty; give some of {', '.join(POLICIES)}")
    for name in names:
        if name not in own:
            _check_name(name)
    labels = [label.strip() for label in budgets.split(",") if label.strip()] or [TRAINED]
    for label in labels:
        if not _is_budget(label):
            raise ConfigError(
                f"--budgets: invalid budget {label!r}; use a number of pairs (256), a ratio (cr4) or {TRAINED!r}"
            )
    ordered = sorted(dict.fromkeys(names), key=lambda name: name != DMS)
    rigid = [name for name in ordered if name == DENSE or (name in own and not _has_budgets(own[name]))]
    if TRAINED in labels and DMS not in ordered and len(rigid) < len(ordered):
        raise ConfigError(
            f"--budgets {TRAINED} means as many live tokens as dms keeps; add dms to --policies, "
            "or give other --budgets, e.g. 256 or cr4"
        )
    methods = [Method(name, "", own.get(name)) for name in rigid]
    return methods + [Method(name, label, own.get(name)) for label in labels for name in ordered if name not in rigid]


def _has_budgets(kind: type[CachePolicy]) -> bool:
    """Return whether a budget changes a policy: by its field, or by the threshold of an evict head."""
    return getattr(kind, "has_budget", False) or getattr(kind, "is_learned", False)


def _check_name(name: str) -> None:
    """Refuse the name of a policy that does not exist, or that the prefix does not fit."""
    within = name.removeprefix(PROMPT)
    if (plain := within.removeprefix(ADAKV)) not in POLICIES:
        raise ConfigError(f"--policies: unknown policy {plain!r}; {suggestion(plain, POLICIES)}")
    kind = POLICIES[plain]
    if plain != within:
        with naming(f"--policies {name}"):
            kind.check_compares_heads()
    if within != name and (kind.keeps_prompt or not kind.ranks_pairs):
        why = "it keeps the prompt" if kind.keeps_prompt else "it does not rank pairs"
        raise ConfigError(f"--policies: {plain} cannot compress a prompt, because {why}; write {plain}")


def _is_budget(label: str) -> bool:
    if not label.startswith("cr"):
        return label == TRAINED or (label.isdecimal() and int(label) >= 1)
    try:
        return 1 <= float(label[2:]) < math.inf
    except ValueError:
        return False


def check_learned(model: Decoder, methods: Iterable[Method], where: str) -> None:
    """Refuse learned policies for the model at `where`, if it has none."""
    learned = [method.policy for method in methods if method.kind.is_learned]
    if model.config.dms is None and learned:
        raise ConfigError(
            f"--policies {learned[0]}: {where} has no eviction policy; give a retrofitted folder or --adapter FILE"
        )


def check_budget(model: Decoder, method: Method, length: int) -> None:
    """Refuse, before anything is measured, a budget that rows of `length` tokens cannot meet."""
    if method.budget in ("", TRAINED):
        return
    pairs = method.pairs(length)
    if not 1 <= pairs <= length:
        raise ConfigError(
            f"--budgets {method.budget} means {pairs} pairs for rows of {length} tokens; "
            f"give 1 to {length}, or cr1 to cr{length}"
        )
    if method.kind.has_budget:
        method.policy_with(model.config, pairs)
        return
    window = method.policy_with(model.config).window_size
    highest = realised_cr(math.inf, length, window)
    if length / pairs > highest:
        raise ConfigError(
            f"{method} means CR {length / pairs:.4g}, but rows of {length} tokens with a window of {window} "
            f"reach at most {highest:.4g}; use longer rows, or a budget of at least {math.ceil(length / highest)} pairs"
        )


def ranked_pairs(policy: CachePolicy) -> int | None:
    """Return the budget that a training-free policy holds from chunk to chunk; None for any other policy.

    Results of a learned policy do not depend on chunks. Its cache gets a slot for each token of a row, so that one
    compiled program serves all thresholds and all budgets of heads.
    """
    return None if policy.is_learned else policy.slot_bounds().max


@dataclass(frozen=True)
class Setup:
    """The policy and the threshold that a method means for rows of one length."""

    policy: CachePolicy
    threshold: float = 0.0
    compresses_prompt: bool = False


class Calibrator:
    """Turns methods into setups. Calibrates each learned method once for each kind of rows."""

    def __init__(self, model: Decoder):
        self.model = model
        self._thresholds: dict[tuple[Method, int, str], float] = {}
        self._head_budgets: dict[tuple[int, int, str], HeadBudgets] = {}

    def dense(self) -> Setup:
        return Setup(policy_of(self.model.config, DENSE))

    def setup(
        self,
        method: Method,
        length: int,
        rows_name: str,
        rows: Callable[[], np.ndarray],
        dms_live_tokens: Callable[[], float | None],
    ) -> Setup:
        """Return the policy and threshold with which `method` meets its budget on rows of `length` tokens.

        `rows` makes calibration rows [rows, length] of the same kind, and `rows_name` names that kind.
        `dms_live_tokens` returns how many live tokens dms kept on that kind of rows if the other methods must keep as
        many, else None. Raises ConfigError.
        """
        if not method.budget:
            return Setup(method.policy_with(self.model.config))
        if method.kind.has_budget:
            pairs = round(self._pairs(method, length, dms_live_tokens))
            if method.kind.is_learned:
                return self._budgeted(pairs, length, rows_name, rows)
            policy = method.policy_with(self.model.config, max(1, pairs))
            return Setup(policy, compresses_prompt=method.compresses_prompt)
        policy = method.policy_with(self.model.config)
        if method.budget == TRAINED and method.policy == DMS:
            return Setup(policy)
        pairs = self._pairs(method, length, dms_live_tokens) if method.budget == TRAINED else method.pairs(length)
        key = method, length, rows_name
        if key not in self._thresholds:
            model = with_window(self.model, policy.window_size)
            self._thresholds[key] = calibrate(model, rows(), length / pairs, tolerance=0.005)
        return Setup(policy, self._thresholds[key])

    def _budgeted(self, pairs: int, length: int, rows_name: str, rows: Callable[[], np.ndarray]) -> Setup:
        """Return a setup whose budget of each head comes from calibration rows."""
        dms, key = self.model.config.require_dms(), (pairs, length, rows_name)
        if pairs <= dms.window_size:  # dms keeps rows that are shorter than its window whole
            return Setup(BudgetedEviction(dms, dms.window_size + 1))
        if key not in self._head_budgets:
            self._head_budgets[key] = head_budgets(self.model, rows(), pairs)
        return Setup(BudgetedEviction(dms, pairs, self._head_budgets[key]))

    def _pairs(self, method: Method, length: int, dms_live_tokens: Callable[[], float | None]) -> float:
        matched = None if method.policy == DMS else dms_live_tokens()
        if matched is None and method.budget == TRAINED:
            raise ConfigError(f"{method} must match the live tokens of dms; measure dms first, with the same --output")
        return method.pairs(length) if matched is None else matched
