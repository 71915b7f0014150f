"""Which pairs leave the cache and which are read: one file per method, which names its paper.

Begin with `cache_policy`, which says what a policy is; `POLICIES` lists all of them by name.
"""

from dataclasses import fields, replace
from typing import Any

from dms_jax.config import ModelConfig
from dms_jax.errors import ConfigError, naming, suggestion
from dms_jax.policies.budgeted_eviction import BudgetedEviction
from dms_jax.policies.cache_policy import CachePolicy
from dms_jax.policies.dropkv import DropKV
from dms_jax.policies.expected_attention import ExpectedAttention
from dms_jax.policies.h2o import H2O
from dms_jax.policies.immediate_eviction import ImmediateEviction
from dms_jax.policies.keep_all import KeepAll
from dms_jax.policies.keydiff import KeyDiff
from dms_jax.policies.knorm import KNorm
from dms_jax.policies.learned_eviction import LearnedEviction, learned_config
from dms_jax.policies.observed_attention import ObservedAttention
from dms_jax.policies.own_policy import checked, made, snake_case
from dms_jax.policies.prompt_compression import PromptCompression
from dms_jax.policies.quest import Quest
from dms_jax.policies.random_attention import RandomAttention
from dms_jax.policies.random_eviction import RandomEviction
from dms_jax.policies.snapkv import SnapKV
from dms_jax.policies.streaming_llm import StreamingLLM
from dms_jax.policies.tova import TOVA
from dms_jax.policies.vase import VaSE

POLICIES: dict[str, type[CachePolicy]] = {
    "dense": KeepAll,
    "dms": LearnedEviction,
    "dms_budget": BudgetedEviction,
    "immediate_eviction": ImmediateEviction,
    "streaming_llm": StreamingLLM,
    "tova": TOVA,
    "h2o": H2O,
    "observed_attention": ObservedAttention,
    "snapkv": SnapKV,
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "dropkv": DropKV,
    "expected_attention": ExpectedAttention,
    "random_all": RandomEviction,
    "random_attention": RandomAttention,
    "vase": VaSE,
    "quest": Quest,
}
PROMPT = "prompt"  # prefix of a name, as in "prompt:tova:256": ranks the prompt once (`prompt_compression`)
ADAKV = "adakv"  # prefix of a name, as in "adakv:snapkv:256": the heads of a layer share budgets (`budget_policy`)


def policy_of(config: ModelConfig, policy: Any = None) -> CachePolicy:
    """Resolve a policy, its class or its name for a model of `config`.

    Args:
      config: the model's configuration.
      policy: a `CachePolicy`, or any hashable object that has its members, which is returned unchanged; the class of
        one without a budget; None for the model's own policy, which keeps everything if the model has no evict head; or
        a name of `POLICIES`, followed by the budget in pairs per KV head if the method has one: "dense", "dms",
        "tova:256", "prompt:snapkv:256", "adakv:h2o:256", "prompt:adakv:h2o:256".

    Raises ConfigError.
    """
    if policy is None:
        return KeepAll() if config.dms is None else LearnedEviction(config.dms)
    if not isinstance(policy, str):
        return made(policy, config) if isinstance(policy, type) else checked(policy)
    text = policy.removeprefix(f"{PROMPT}:")
    shares = text.startswith(f"{ADAKV}:")
    name, _, budget = text.removeprefix(f"{ADAKV}:").partition(":")
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; {suggestion(name, POLICIES)}")
    with naming(f"policy {policy!r}"):
        if shares:
            POLICIES[name].check_compares_heads()
        method = POLICIES[name].from_text(budget, config)
        if shares:
            method = replace(method, adakv_heads=config.num_kv_heads)  # pyrefly: ignore[bad-specialization]
        if text == policy:
            return method
        return PromptCompression(method)  # pyrefly: ignore[bad-argument-type]  # it checks the type


def describe(policy: CachePolicy) -> dict:
    """Return plain values from which `restored` makes the policy again.

    They do not include the `DMSConfig` of a learned policy, which `restored` takes from the model, nor what a cache
    holds in arrays (`CachePolicy.in_cache`). Raises ConfigError for a policy that is not in `POLICIES`, because
    `restored` would not find its class.
    """
    if isinstance(policy, PromptCompression):
        return {"name": PROMPT, "method": describe(policy.method)}
    name = _registered(type(policy))
    if name is None:
        raise ConfigError(
            f"policy {type(policy).__name__} is not in dms_jax.policies.POLICIES, so no file can name it; "
            "add it there, also where the file is loaded, or keep the cache in memory"
        )
    policy = policy.in_cache()
    numbers = {field.name: getattr(policy, field.name) for field in fields(policy)}  # pyrefly: ignore[bad-argument-type]
    return {"name": name, **{key: number for key, number in numbers.items() if key != "dms" and number is not None}}


def policy_name(policy: CachePolicy | type) -> str:
    """Return the name of a policy, or of a class without its budget, in records, tables and figures.

    `policy_of` resolves it to this policy, if that is in `POLICIES` and its other parameters are the defaults. A class
    that is not in `POLICIES` has its own name in snake case, or "own_tova" if that is the name of another class.
    """
    if isinstance(policy, PromptCompression):
        return f"{PROMPT}:{policy_name(policy.method)}"
    kind = policy if isinstance(policy, type) else type(policy)
    own = snake_case(kind.__name__)
    name = _registered(kind) or (f"own_{own}" if own in POLICIES else own)
    if isinstance(policy, type) or not policy.has_budget:
        return name
    shared = getattr(policy, "adakv_heads", None) is not None
    return f"{ADAKV}:" * shared + f"{name}:{policy.budget}"  # pyrefly: ignore[missing-attribute]  # `has_budget` says so


def _registered(kind: type) -> str | None:
    return next((name for name, known in POLICIES.items() if known is kind), None)


def restored(described: dict, config: ModelConfig) -> CachePolicy:
    """Make a policy from the output of `describe`. Raises ConfigError, KeyError or TypeError for any other dict."""
    numbers = dict(described)
    name = numbers.pop("name")
    if name == PROMPT:
        return PromptCompression(restored(numbers["method"], config))  # pyrefly: ignore[bad-argument-type]
    kind = POLICIES[name]
    own = (learned_config(config),) if kind.is_learned else ()
    return kind(*own, **numbers)  # pyrefly: ignore[bad-argument-count]  # a learned policy begins with its `DMSConfig`
