"""Frozen configurations, and the strict builder that turns YAML and `--set a.b=c` into them."""

import contextlib
import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A configuration that cannot work: what, where, and the way out, in one line."""


MOST = 2**31 - 1  # of any size or count: JAX indexes with int32
MOST_LAYERS = 4096  # far beyond any decoder; a damaged file must not make us name a billion tensors


@dataclass(frozen=True)
class DMSConfig:
    """The eviction policy of one model. Source: DMS, arXiv:2506.05345; names of the released `dms_*` keys in brackets."""

    variant: Literal["projection", "borrowed"] = "projection"  # own linear map, or the last channel of a query head
    window_size: int = 256  # >= 0, at most 2**30; a marked pair is visible to itself and this many later queries [dms_window_size]
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


ImplementationName = Literal["auto", "xla", "mosaic_gpu", "pallas_tpu"]  # of attention and cache: `dms_jax.kernels.dispatch`


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
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_q_heads", "num_kv_heads", "head_dim", "max_position_embeddings"):
            _require(_is_whole(getattr(self, name)) and 1 <= getattr(self, name) <= MOST, name, getattr(self, name), "a whole number in [1, 2**31)")
        _require(_is_whole(self.num_layers) and 1 <= self.num_layers <= MOST_LAYERS, "num_layers", self.num_layers, f"in [1, {MOST_LAYERS}]")
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even: rotary embeddings turn pairs of channels")
        _require(0 <= self.rms_norm_eps < math.inf, "rms_norm_eps", self.rms_norm_eps, "a finite number >= 0")
        _require(0 < self.rope_theta < math.inf, "rope_theta", self.rope_theta, "a finite number > 0")
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_q_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly")

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def policy(self) -> DMSConfig:
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


def shown(value: object) -> str:
    """A value for a message: its repr, but short however large, deep or self-containing it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an int of more digits than Python writes
        return f"a {type(value).__name__} too large to print"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """Errors of what is read inside begin with the file, or the option, that it came from."""
    try:
        yield
    except ConfigError as why:
        raise ConfigError(f"{where}: {why}") from why


def nearest_name(name: str, known: typing.Iterable[str]) -> str:
    """The known name closest to a misspelt one, or all of them."""
    known = sorted(known)
    return " | ".join(difflib.get_close_matches(name, known, n=1) or known)


def build(cls: type, raw: dict, path: str = "") -> Any:
    """A frozen dataclass from nested plain values; unknown keys and wrong types are errors that name the key."""
    if not isinstance(raw, dict):
        raise ConfigError(f"`{path.rstrip('.') or 'config'}` wants a mapping of keys, got {shown(raw)}")
    wanted = typing.get_type_hints(cls)
    for name in raw.keys() - wanted.keys():
        raise ConfigError(f"unknown config key `{path}{name}`; did you mean {nearest_name(str(name), wanted)}?")
    return cls(**{name: _coerce(wanted[name], value, f"{path}{name}") for name, value in raw.items()})


def _coerce(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _coerce(next(a for a in arguments if a is not type(None)), value, path)
    if origin is Literal:
        if value not in arguments or type(value) not in map(type, arguments):  # 1 == 1.0 == True
            raise ConfigError(f"`{path}` must be one of {', '.join(map(str, arguments))}; got {shown(value)}")
        return value
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, f"{path}.")
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(arguments[0], item, path) for item in items)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads `1e-4` as a string
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise ConfigError(f"`{path}` wants float, finite; got {shown(value)}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"`{path}` wants {kind.__name__}, got {shown(value)}")
    return value


def read_yaml(path: str) -> dict:
    """The mapping in a YAML file."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, ValueError) as why:  # ValueError: not UTF-8, or a path that holds a NUL
        raise ConfigError(f"cannot read config {path}: {why}") from why
    raw = _parse_yaml(text, f"{path} is not valid YAML")
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, got {type(raw).__name__}")
    return raw or {}


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: the last would win unseen."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {shown(key_node.value)} stands twice", key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, complaint: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError as why:
        raise ConfigError(f"{complaint}: it is nested too deeply") from why
    except Exception as why:  # YAMLError, and whatever int(), datetime() and others say of a scalar
        raise ConfigError(f"{complaint}: {' '.join(str(why).split())}") from why


def override(raw: dict, assignment: str) -> None:
    """Apply one `--set dotted.key=value` to nested plain values, in place."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set wants key=value, e.g. dms.window_size=256; got {shown(assignment)}")
    *parents, last = key.strip().split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"--set {shown(assignment)}: `{parent}` is a single value, it has no `{last}`")
    merge(raw, {last: _parse_yaml(text, f"--set {shown(assignment)}: {shown(text)} is not a YAML value")})


def merge(into: dict, raw: dict) -> None:
    """Lay nested values over others, in place: a key that is given does not reset its neighbours."""
    for key, value in raw.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value
