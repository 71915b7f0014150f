"""Frozen configurations of a model and of its eviction policy."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from dms_jax.config_reader import MAX_INT
from dms_jax.errors import ConfigError, shown

MAX_LAYERS = 4096  # far beyond any decoder; a damaged file must not make us name a billion tensors


@dataclass(frozen=True)
class DMSConfig:
    """The eviction policy of one model. Source: DMS, arXiv:2506.05345; names of the released `dms_*` keys in brackets."""

    variant: Literal["projection", "borrowed"] = "projection"  # own linear map, or the last channel of a query head
    window_size: int = (
        256  # >= 0, at most 2**30; a marked pair is visible to itself and this many later queries [dms_window_size]
    )
    target_cr: float = 8.0  # >= 1; nominal ratio the training aims at; documentation afterwards [dms_cr]
    tau: float = 0.1  # > 0; temperature of the relaxed gate in training [dms_tau]
    evict_logit_scale: float = 100.0  # logit = scale * raw - bias [dms_alpha_scale]
    evict_logit_bias: float = 5.0  # [dms_initial_alpha_offset]
    granularity: Literal["head", "layer"] = "head"  # "layer": KV head 0 decides for all [dms_alpha_per]
    decision_shift: Literal[0, 1] = 1  # 1: token t+1 decides pair t (NVIDIA); 0: its own (FastDMS) [dms_decision_shift]
    zero_borrowed: Literal["none", "pre", "pre+post"] = "pre+post"  # when, around RoPE, the borrowed channel is zeroed

    def __post_init__(self):
        # position + window_size is an int32 expiry
        _require(0 <= self.window_size <= 2**30, "dms.window_size", self.window_size, ">= 0 and at most 2**30")
        _require(1 <= self.target_cr < math.inf, "dms.target_cr", self.target_cr, ">= 1 (1 is dense)")
        _require(0 < self.tau < math.inf, "dms.tau", self.tau, "> 0")
        _require(math.isfinite(self.evict_logit_scale), "dms.evict_logit_scale", self.evict_logit_scale, "finite")
        _require(math.isfinite(self.evict_logit_bias), "dms.evict_logit_bias", self.evict_logit_bias, "finite")


ImplementationName = Literal[
    "auto", "xla", "mosaic_gpu", "pallas_tpu"
]  # of attention and cache: `dms_jax.kernels.dispatch`


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. `llama3` needs all fields, `linear` only `factor`."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shape and mathematics of a decoder: the part of `config.json` that changes the numbers."""

    model_type: str  # "llama", "mistral", "qwen2", "qwen3": decides only how the folder is written back
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # Qwen 2, or `attention_bias`
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen 3: RMSNorm over head_dim of queries and keys
    sliding_window: int | None = None  # the model's own; rows longer than it are refused
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dms: DMSConfig | None = None
    implementation: ImplementationName = "auto"  # how attention is computed, not what; no key of config.json

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_q_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            _require(
                _is_whole(getattr(self, name)) and 1 <= getattr(self, name) <= MAX_INT,
                name,
                getattr(self, name),
                "a whole number in [1, 2**31)",
            )
        _require(
            _is_whole(self.num_layers) and 1 <= self.num_layers <= MAX_LAYERS,
            "num_layers",
            self.num_layers,
            f"in [1, {MAX_LAYERS}]",
        )
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even: rotary embeddings turn pairs of channels")
        _require(0 <= self.rms_norm_eps < math.inf, "rms_norm_eps", self.rms_norm_eps, "a finite number >= 0")
        _require(0 < self.rope_theta < math.inf, "rope_theta", self.rope_theta, "a finite number > 0")
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_q_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly")

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_q_heads // self.num_kv_heads

    def context_limit(self) -> tuple[int, str]:
        """Return the maximum number of tokens in a row, and the name of the limit that sets it."""
        limits = [(self.max_position_embeddings, "max_position_embeddings")]
        if self.sliding_window is not None:
            limits.append((self.sliding_window, "own sliding_window"))
        return min(limits)

    def require_dms(self) -> DMSConfig:
        """`dms`, where there has to be one."""
        if self.dms is None:
            raise ValueError("this model has no eviction policy; load it with dms=DMSConfig(...), or use model.dense")
        return self.dms

    def with_dms(self, dms: DMSConfig | None) -> "ModelConfig":
        return dataclasses.replace(self, dms=dms)


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {rule}, got {shown(value)}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
