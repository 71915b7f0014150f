"""Which pairs leave the cache and which are read: one file for each method, with its paper on top.

Begin with `cache_policy`, which says what a policy is; `POLICIES` lists all of them by name.
"""

from dataclasses import asdict

from dms_jax.config import ModelConfig
from dms_jax.errors import ConfigError, naming, suggestion
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

POLICIES: dict[str, type[CachePolicy]] = {
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
PROMPT = "prompt"  # prefix of a name, as in "prompt:tova:256": the same method under the prompt-compression protocol


def policy_of(config: ModelConfig, policy: CachePolicy | str | None = None) -> CachePolicy:
    """Return the policy that a caller means for a model of `config`.

    Args:
      config: the model's configuration.
      policy: a `CachePolicy`, which is returned as it is; None for the model's own policy, which keeps everything if
        the model is plain; or a name of `POLICIES` with its budget, if it has one, in pairs per KV head: "dense",
        "dms", "tova:256", "prompt:snapkv:256".

    Raises ConfigError.
    """
    if policy is None:
        return KeepAll() if config.dms is None else LearnedEviction(config.dms)
    if isinstance(policy, CachePolicy):
        return policy
    if not isinstance(policy, str):
        raise ConfigError(f"policy must be a CachePolicy or a name ({', '.join(POLICIES)}), got {policy!r}")
    text = policy.removeprefix(f"{PROMPT}:")
    name, _, budget = text.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; {suggestion(name, POLICIES)}")
    with naming(f"policy {policy!r}"):
        method = POLICIES[name].from_text(budget, config)
        return method if text == policy else PromptCompression(method)  # pyrefly: ignore[bad-argument-type]  # it checks


def describe(policy: CachePolicy) -> dict:
    """Return plain values from which `restored` makes the policy again, but for what a retrofitted model learned.

    Raises ConfigError for a policy that is not in `POLICIES`.
    """
    if isinstance(policy, PromptCompression):
        return {"name": PROMPT, "method": describe(policy.method)}
    name = next((name for name, kind in POLICIES.items() if kind is type(policy)), None)
    if name is None:
        raise ConfigError(f"only a policy of {', '.join(POLICIES)} can be described, got {type(policy).__name__}")
    fields = {} if policy.is_learned else asdict(policy)  # pyrefly: ignore[bad-argument-type]  # a dataclass
    return {"name": name, **fields}


def restored(described: dict, config: ModelConfig) -> CachePolicy:
    """Make the policy that `describe` described. Raises ConfigError, KeyError or TypeError for any other dict."""
    fields = dict(described)
    name = fields.pop("name")
    if name == PROMPT:
        return PromptCompression(restored(fields["method"], config))  # pyrefly: ignore[bad-argument-type]  # it checks
    return POLICIES[name](**fields) if fields else policy_of(config, name)
