"""Frozen configurations of a model and of its learned eviction policy."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from dms_jax.config_reader import Above, AtLeast, Between, check_ranges
from dms_jax.errors import ConfigError, shown

MAX_LAYERS = 4096  # far beyond any decoder, so that a damaged file cannot make us name a billion tensors
MAX_FLOAT = 3.4e38  # of float32, in which evict logits are computed
MAX_WINDOW = 2**30  # position + window_size is an int32 expiry
MAX_UNITS = 2**16  # of an evict head; far more than any head needs, so that a damaged file cannot ask for terabytes

ImplementationName = Literal["auto", "xla", "mosaic_gpu", "pallas_tpu"]  # see `dms_jax.kernels.dispatch`
Overflow = Literal["evict", "raise", "grow"]  # what a full buffer of the cache does; see `dms_jax.init_cache`
OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)


@dataclass(frozen=True)
class DMSConfig:
    """The learned eviction policy of one model.

    Source: DMS, arXiv:2506.05345. The meaning of a field ends with its `dms_*` key in released models, in brackets.
    """

    variant: Annotated[
        Literal["projection", "borrowed"],
        "where the evict logit comes from. projection: a linear map of its own; borrowed: the last channel of the "
        "first query head of each group",
    ] = "projection"
    window_size: Annotated[
        int,
        AtLeast(0),
        "number of later queries that still see a pair once it is marked for eviction [dms_window_size]",
    ] = 256
    target_cr: Annotated[
        float, AtLeast(1), "nominal compression ratio that training aims at; 1 evicts nothing [dms_cr]"
    ] = 8.0
    tau: Annotated[float, Above(0), "temperature of the relaxed (soft) eviction gate in training [dms_tau]"] = 0.1
    evict_logit_scale: Annotated[
        float,
        "evict logit = scale * raw - bias, where raw is what the variant computes; this is the scale [dms_alpha_scale]",
    ] = 100.0
    evict_logit_bias: Annotated[
        float, "the bias in the evict logit; a larger bias evicts less at the start [dms_initial_alpha_offset]"
    ] = 5.0
    granularity: Annotated[
        Literal["head", "layer"],
        "head: each KV head decides for itself; layer: KV head 0 decides for its whole layer [dms_alpha_per]",
    ] = "head"
    decision_shift: Annotated[
        Literal[0, 1], "which logit decides about pair t. 1: that of token t + 1 (NVIDIA); 0: that of token t (FastDMS)"
    ] = 1
    zero_borrowed: Annotated[
        Literal["none", "pre", "pre+post"],
        "when the borrowed channel is set to zero. none: never; pre: before RoPE; pre+post: before and after RoPE",
    ] = "pre+post"
    head_units: Annotated[
        int,
        Between(0, MAX_UNITS),
        "hidden units of an MLP that the projection variant adds to its linear map; 0: a linear head, in the format of "
        "Model-Optimizer [dms_head_units]",
    ] = 0

    def __post_init__(self):
        check_ranges(self, "dms.")
        if self.head_units and self.variant == "borrowed":
            raise ConfigError(
                "dms.head_units must be 0 with dms.variant=borrowed (or mode=borrowed), whose evict logit is a channel "
                f"of a query; got {self.head_units}; drop it, or use dms.variant=projection"
            )
        if self.window_size > MAX_WINDOW:
            raise ConfigError(f"dms.window_size must be at most 2**30, got {shown(self.window_size)}")
        for name in ("target_cr", "tau", "evict_logit_scale", "evict_logit_bias"):
            if not abs(getattr(self, name)) <= MAX_FLOAT:  # also refuses NaN
                raise ConfigError(f"dms.{name} must be a finite float32 number, got {shown(getattr(self, name))}")


@dataclass(frozen=True)
class RopeScaling:
    """The scaling of rotary frequencies. `llama3` needs all fields, `linear` only `factor`."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


Size = Annotated[int, AtLeast(1)]


@dataclass(frozen=True)
class ModelConfig:
    """Shape and mathematics of a decoder: the part of `config.json` that changes the numbers."""

    model_type: str  # "llama", "mistral", "qwen2" or "qwen3"; the fields below already hold all that depends on it
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_layers: Annotated[int, Between(1, MAX_LAYERS)]
    num_q_heads: Size
    num_kv_heads: Size
    head_dim: Size
    rms_norm_eps: Annotated[float, AtLeast(0)] = 1e-6
    rope_theta: Annotated[float, Above(0)] = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: Size = 4096
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # Qwen 2, or `attention_bias`
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen 3: RMSNorm over head_dim of queries and keys
    sliding_window: Size | None = None  # attention window of the model itself, not of a policy; longer rows are refused
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dms: DMSConfig | None = None
    implementation: ImplementationName = "auto"  # how attention is computed; not a key of config.json

    def __post_init__(self):
        check_ranges(self)
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim must be even, because rotary embeddings rotate pairs of channels; got {self.head_dim}"
            )
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_q_heads must be a multiple of num_kv_heads, got {self.num_q_heads} and {self.num_kv_heads}"
            )

    @property
    def group_size(self) -> int:
        """Number of query heads that share a KV head."""
        return self.num_q_heads // self.num_kv_heads

    def context_limit(self) -> tuple[int, str]:
        """Return the maximum number of tokens in a row, and the name of the limit that sets it."""
        limits = [(self.max_position_embeddings, "max_position_embeddings")]
        if self.sliding_window is not None:
            limits.append((self.sliding_window, "own sliding_window"))
        return min(limits)

    def require_dms(self) -> DMSConfig:
        """Return `dms`; raise ValueError for a model without a learned policy."""
        if self.dms is None:
            raise ValueError(
                "this model has no learned eviction policy; load it with dms=DMSConfig(...) or call model.dense"
            )
        return self.dms

    def with_dms(self, dms: DMSConfig | None) -> "ModelConfig":
        """Return a copy with `dms` as its learned policy, or without one if `dms` is None."""
        return dataclasses.replace(self, dms=dms)
