"""Policies that a user writes in a cell: accepted wherever a name is, named in results, and checked."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from cases import TINY, tiny_model, tokens

import dms_jax
from dms_jax.core.visibility import NEVER
from dms_jax.engine.head_budgets import policy_for_rows
from dms_jax.errors import ConfigError
from dms_jax.evaluation.methods import Calibrator, Method, check_budget, parse_methods
from dms_jax.evaluation.teacher_forced import dense_hidden, online_rows
from dms_jax.policies import POLICIES, TOVA, PromptCompression, describe, policy_name, policy_of
from dms_jax.policies.keep_all import KeepAll
from dms_jax.policies.own_policy import MEMBERS, snake_case
from dms_jax.reporting.report_colors import policy_look


@dataclass(frozen=True)
class KeepOld(dms_jax.BudgetPolicy):
    """Keep the oldest pairs, and the newest one."""

    def keep_scores(self, pairs):
        return jnp.where(pairs.age == 0, jnp.inf, -pairs.position.astype(jnp.float32))


@dataclass(frozen=True)
class EvenOnly(KeepAll):
    """Let odd positions leave after four more queries: no budget, and no head that was trained."""

    window_size: ClassVar[int] = 4

    def fused_rule(self):
        return None

    def mark(self, logits, position, count, threshold):
        expiry = jnp.where(position % 2 == 1, position + self.window_size, NEVER)[:, None]
        shape = logits.shape
        return dms_jax.Expiries(jnp.broadcast_to(expiry, shape), jnp.zeros(shape, jnp.float32), None, None)


class Duck:
    """Answers everything that `CachePolicy` does, without deriving from it."""

    def __init__(self, policy):
        self.policy = policy

    def __getattr__(self, name):
        if name not in MEMBERS:
            raise AttributeError(name)
        return getattr(self.policy, name)


def held_positions(cache):
    """Return the positions that each head of row 0 holds in layer 0."""
    layer = cache.layers[0]
    alive = np.asarray(layer.expiry[0]) >= int(cache.seen[0]) - 1
    return [sorted(np.asarray(layer.position[0, head])[alive[head]].tolist()) for head in range(len(alive))]


@pytest.mark.parametrize("policy, held", [(KeepOld(5), [0, 1, 2, 3, 9]), (EvenOnly, [0, 2, 4, 5, 6, 7, 8, 9])])
def test_own_policy_decides_in_every_entrance(rng, policy, held):
    model, rows = tiny_model(None), tokens(rng, 1, 10)
    cache = dms_jax.init_cache(model, 1, 12, policy=policy)
    _, cache = dms_jax.prefill(model, cache, rows)
    assert held_positions(cache) == [held] * TINY.num_kv_heads
    config = dms_jax.GenerationConfig(policy=policy, max_new_tokens=1, cache="slots", stop_ids=())
    assert dms_jax.generate(model, rows, config).live_pairs[0] == len(held)  # a pair came, and one left
    assert policy_for_rows(model, policy, False, 10) == policy_of(model.config, policy)
    out = online_rows(model, dense_hidden(model, rows), rows, policy, chunk=10)
    assert held_positions(out.cache) == [held] * TINY.num_kv_heads
    duck = Duck(policy_of(model.config, policy))
    assert policy_of(model.config, duck) is duck


def test_evaluation_makes_a_class_once_for_each_budget(rng):
    model = tiny_model(None)
    methods = parse_methods([KeepOld, "dense", EvenOnly, "tova"], "cr2,8")
    assert methods == [
        Method("dense", ""),
        Method("even_only", "", EvenOnly),
        Method("keep_old", "cr2", KeepOld),
        Method("tova", "cr2"),
        Method("keep_old", "8", KeepOld),
        Method("tova", "8"),
    ]
    calibrator = Calibrator(model)
    for method in methods:
        check_budget(model, method, 64)
    made = [calibrator.setup(method, 64, "rows", lambda: None, lambda: None).policy for method in methods]
    assert made == [KeepAll(), EvenOnly(), KeepOld(32), TOVA(32), KeepOld(8), TOVA(8)]
    assert not methods[2].kind.is_learned and str(methods[2]) == "keep_old@cr2"


def test_names_of_classes_need_no_registration():
    assert [snake_case(name) for name in ("KeepOld", "TOVA2", "KVNorm", "H2O", "Old2Young")] == [
        "keep_old",
        "tova2",
        "kv_norm",
        "h2o",
        "old2_young",
    ]
    assert (
        policy_name(KeepOld(7)) == "keep_old:7" and policy_name(KeepOld) == "keep_old" and policy_name(TOVA) == "tova"
    )
    assert policy_name(PromptCompression(KeepOld(7))) == "prompt:keep_old:7"
    namesake = dataclass(frozen=True)(type("Tova", (KeepOld,), {}))
    assert policy_name(namesake(7)) == "own_tova:7"
    assert policy_look("keep_old") == policy_look("keep_old")


@dataclass
class NotFrozen(dms_jax.CachePolicy):
    size: int = 3
    window_size: ClassVar[int] = 0
    slot_bounds = mark = None


@dataclass(frozen=True)
class WithList(KeepOld):
    ids: list = field(default_factory=list)


class NoScores(dms_jax.BudgetPolicy):
    pass


class OnlyMark:
    def mark(self):
        pass


@pytest.mark.parametrize(
    "policy, words",
    [
        (NotFrozen(), ["NotFrozen", "@dataclass(frozen=True)"]),
        (WithList(3), ["WithList", "tuples"]),
        (OnlyMark(), ["OnlyMark", "is_learned", "dms_jax.CachePolicy"]),
        (OnlyMark, ["OnlyMark", "is_learned"]),
        (KeepOld, ["KeepOld(256)"]),
        (7, ["7"]),
    ],
)
def test_object_that_is_no_policy_is_refused_in_one_line(policy, words):
    with pytest.raises(ConfigError) as caught:
        dms_jax.init_cache(tiny_model(None), 1, 8, policy=policy)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_missing_method_of_a_class_is_named_by_the_evaluation():
    (method,) = parse_methods([NoScores], "8")
    with pytest.raises(ConfigError, match="NoScores.*keep_scores"):
        check_budget(tiny_model(None), method, 64)


def test_saving_a_cache_under_an_own_policy_is_refused(tmp_path):
    model = tiny_model(None)
    cache = dms_jax.init_cache(model, 1, 8, policy=KeepOld(8))
    for act in (lambda: describe(KeepOld(8)), lambda: dms_jax.save_cache(model, cache, tmp_path / "c.safetensors")):
        with pytest.raises(ConfigError, match=r"KeepOld .*POLICIES"):
            act()
    assert not list(tmp_path.iterdir())


# --- check_policy ---


@pytest.mark.parametrize("policy", [KeepOld, EvenOnly, KeepAll, "dms", "dms_budget:9", "adakv:snapkv:10", "quest:32"])
def test_check_accepts_policies_that_keep_the_contract(policy):
    dms_jax.check_policy(policy)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_check_accepts_the_policies_of_the_package(name):
    dms_jax.check_policy(POLICIES[name])


@dataclass(frozen=True)
class TooMany(KeepOld):
    def kept(self, pairs, max_leaving=None):
        return pairs.alive


@dataclass(frozen=True)
class Revives(KeepOld):
    def kept(self, pairs, max_leaving=None):
        return jnp.ones_like(pairs.alive)


@dataclass(frozen=True)
class NaNScores(KeepOld):
    def keep_scores(self, pairs):
        return jnp.where(pairs.position % 5 == 3, jnp.nan, 0.0)


@dataclass(frozen=True)
class ReadsTheDead(KeepOld):
    """Ranks by the distance from the mean of all slots, dead ones included."""

    def keep_scores(self, pairs):
        size = jnp.sum(jnp.nan_to_num(pairs.k, nan=9.0), axis=-1)
        return -jnp.abs(size - jnp.mean(size, axis=-1, keepdims=True))


@dataclass(frozen=True)
class ByChunk(EvenOnly):
    """Marks the first pair of each chunk."""

    def mark(self, logits, position, count, threshold):
        first = position == position[:, :1]
        expiry = jnp.where(first, position + 1, NEVER)[:, None]
        shape = logits.shape
        return dms_jax.Expiries(jnp.broadcast_to(expiry, shape), jnp.zeros(shape, jnp.float32), None, None)


@pytest.mark.parametrize(
    "policy, words",
    [
        (TooMany, "too_many.* 32"),
        (Revives, "revives.*not alive"),
        (NaNScores, "NaN"),
        (ReadsTheDead, "dead slots"),
        (ByChunk, "chunks"),
    ],
)
def test_check_finds_what_breaks_the_contract(policy, words):
    with pytest.raises(ConfigError, match=words):
        dms_jax.check_policy(policy)
