"""Who leaves the cache and who is read, one file per method, its paper on top."""

import re
from dataclasses import asdict

from dms_jax.config import ModelConfig
from dms_jax.errors import ConfigError, naming, shown, suggestion
from dms_jax.policies.budget_policy import BudgetPolicy
from dms_jax.policies.cache_policy import CachePolicy
from dms_jax.policies.h2o import H2O
from dms_jax.policies.immediate_eviction import ImmediateEviction
from dms_jax.policies.keep_all import KeepAll
from dms_jax.policies.keydiff import KeyDiff
from dms_jax.policies.knorm import KNorm
from dms_jax.policies.learned_eviction import LearnedEviction
from dms_jax.policies.observed_attention import ObservedAttention
from dms_jax.policies.prompt_compression import PromptCompression
from dms_jax.policies.quest import Quest
from dms_jax.policies.random_eviction import RandomEviction
from dms_jax.policies.snapkv import SnapKV
from dms_jax.policies.streaming_llm import StreamingLLM
from dms_jax.policies.tova import TOVA

POLICIES = {
    "dense": KeepAll,
    "dms": LearnedEviction,
    "immediate_eviction": ImmediateEviction,
    "streaming_llm": StreamingLLM,
    "tova": TOVA,
    "h2o": H2O,
    "observed_attention": ObservedAttention,
    "snapkv": SnapKV,
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "random": RandomEviction,
    "quest": Quest,
}
PROMPT = "prompt"  # prefix of a name: the same method under the prompt-compression protocol


def policy_of(config: ModelConfig, policy: CachePolicy | str | None = None) -> CachePolicy:
    """The policy that a caller means: an object is taken as it is, None is the model's own (none for a plain model), and a
    name is one of `POLICIES`, with its budget in pairs where it has one: "dense", "dms", "tova:256", "prompt:snapkv:256".

    Raises ConfigError.
    """
    if policy is None:
        return KeepAll() if config.dms is None else LearnedEviction(config.dms)
    if not isinstance(policy, str):
        if not isinstance(policy, (*POLICIES.values(), PromptCompression)):
            raise ConfigError(f"policy wants a name ({', '.join(POLICIES)}) or a CachePolicy, got {policy!r}")
        return policy
    text = policy.removeprefix(f"{PROMPT}:")
    name, _, budget = text.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; {suggestion(name, POLICIES)}")
    method = _built(POLICIES[name], name, budget, config)
    if text == policy:
        return method
    if not isinstance(method, BudgetPolicy):
        raise ConfigError(
            f"policy {policy!r}: {name} does not rank pairs, so it cannot compress a prompt; use {text!r}"
        )
    return PromptCompression(method)


def _built(kind: type, name: str, budget: str, config: ModelConfig) -> CachePolicy:
    if issubclass(kind, BudgetPolicy | Quest):
        if not re.fullmatch("[0-9]{1,9}", budget):
            raise ConfigError(
                f"policy {name} needs a budget in pairs per KV head, e.g. {name}:256; got {shown(budget)}"
            )
        with naming(f"policy {name}:{budget}"):
            return kind(int(budget))
    if budget:
        raise ConfigError(f"policy {name} has no budget; use {name!r}")
    if issubclass(kind, LearnedEviction):
        if config.dms is None:
            raise ConfigError(
                f"policy {name} needs a retrofitted model, this one is plain; load it with its evict head"
            )
        return kind(config.dms)
    return kind()


def describe(policy: CachePolicy) -> dict:
    """Plain values from which `restored` makes it again; what a retrofitted model learned is not among them."""
    if isinstance(policy, PromptCompression):
        return {"name": PROMPT, "method": describe(policy.method)}
    name = next(name for name, kind in POLICIES.items() if kind is type(policy))
    return {"name": name} if isinstance(policy, LearnedEviction) else {"name": name, **asdict(policy)}  # pyrefly: ignore[bad-argument-type] - every policy is a dataclass


def restored(described: dict, config: ModelConfig) -> CachePolicy:
    """The policy that `describe` described. Raises ConfigError, KeyError or TypeError for anything else."""
    fields = dict(described)
    name = fields.pop("name")
    if name == PROMPT:
        return PromptCompression(restored(fields["method"], config))  # pyrefly: ignore[bad-argument-type] - refused by its own check
    return POLICIES[name](**fields) if fields else policy_of(config, name)
