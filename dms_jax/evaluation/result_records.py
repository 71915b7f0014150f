"""The lines of a results file as typed records, with one dataclass for each kind of measurement.

`ResultsFile.append` writes a record with `asdict`, so the fields are the keys of the file; `record_of` reads it back.
Keys that no field has are ignored, and fields with a default may be absent. Imports no JAX.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np

from dms_jax.config_reader import AtLeast, Between, build, check_ranges
from dms_jax.errors import ConfigError, naming, shown

HYPERSCALE = "hyperscale/"  # begins the task of a `HyperscaleRecord`
Key = tuple[str, str, str, str]  # task, policy, budget, unit


@dataclass(frozen=True, kw_only=True)
class Record:
    """The fields that identify a measurement."""

    task: str
    policy: str
    budget: str  # "256", "cr4", "trained", or "" for the dense model; in hyper-scaling, SAMPLES-TOKENS-CR
    unit: str  # the example that was measured, e.g. "prose/3"

    @property
    def key(self) -> Key:
        return self.task, self.policy, self.budget, self.unit

    @property
    def method(self) -> str:
        return method_name(self.policy, self.budget)


@dataclass(frozen=True, kw_only=True)
class TextRecord(Record):
    """One row of given text. KL is KL(dense || method), in nats."""

    domain: str
    length: Annotated[int, AtLeast(1)]  # T, tokens of the row
    live_tokens: float  # pairs per KV head after the row, mean over layers and heads
    mean_live_tokens: float | None = None  # the same, mean over the row
    pairs_read: float | None = None  # by a token decoded after the row
    realised_cr: float | None = None
    nominal_cr: float
    threshold: float = 0.0
    agree: float  # fraction of tokens whose likeliest successor is that of the dense model
    kl: list  # [T-1] by position
    nll: list  # [T-1] negative log-likelihood of the row's own next token

    def __post_init__(self):
        check_ranges(self)
        _require_numbers(self, "kl", "nll")
        if len(self.kl) != len(self.nll):
            raise ConfigError(f"`kl` and `nll` must have the same length, got {len(self.kl)} and {len(self.nll)}")


@dataclass(frozen=True, kw_only=True)
class GreedyRecord(Record):
    """One greedy continuation of a row, compared with that of the dense model."""

    domain: str
    tokens: int
    match: float  # fraction of tokens equal to those of the dense model
    divergence: int  # index of the first token that differs; `tokens` if none does
    live_tokens: float
    realised_cr: float


@dataclass(frozen=True, kw_only=True)
class KeptRecord(Record):
    """The pairs of one row that remain in the cache under a learned policy."""

    domain: str
    length: Annotated[int, AtLeast(1)]  # T, tokens of the row
    pieces: list  # [T] the text of each token
    kept: list  # [T] fraction of (layer, head) that still hold the token's pair after the row
    live_per_head: list  # [L K] pairs after the row
    live_by_position: list  # [T] pairs after each token, mean over layers and heads
    window_size: int
    realised_cr: float | None = None

    def __post_init__(self):
        check_ranges(self)
        _require_numbers(self, "kept", "live_by_position")
        _require_numbers(self, "live_per_head", dimensions=2)
        if not all(isinstance(piece, str) for piece in self.pieces):
            raise ConfigError("`pieces` must be a list of texts")
        for name in ("pieces", "kept", "live_by_position"):
            if len(getattr(self, name)) != self.length:
                raise ConfigError(f"`{name}` must have `length` = {self.length} items, got {len(getattr(self, name))}")


@dataclass(frozen=True, kw_only=True)
class ScoredRecord(Record):
    """The cost and the score of answering one problem. Counts of pairs are per KV head, mean over layers and heads."""

    score: Annotated[float, Between(0, 1)]
    live_tokens: float  # pairs after the answer
    peak_live: float  # the maximum number of pairs at any time
    realised_cr: float
    kv_reads: float  # pairs that the attention of the generated tokens read
    groups: dict = field(default_factory=dict)  # what tables group by: "length", "depth", ...

    def __post_init__(self):
        check_ranges(self)

    @property
    def problem_id(self) -> str:
        return self.unit


@dataclass(frozen=True, kw_only=True)
class AnswerRecord(ScoredRecord):
    """One sampled answer to one problem."""

    problem: str = ""  # the unit of the problem, if its samples have units of their own
    extracted: str = ""  # the answer in normal form, by which samples vote
    answer_logprob: float | None = None  # log p of the reference answer; None if the task does not measure it
    text: str = ""
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    finish_reason: str = ""
    threshold: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def problem_id(self) -> str:
        return self.problem or self.unit


@dataclass(frozen=True, kw_only=True)
class HyperscaleRecord(ScoredRecord):
    """All sampled answers to one problem under one configuration. Costs are sums over the samples; `score` is that of
    the answer that they elect."""

    new_tokens: float
    prefill_seconds: float
    decode_seconds: float
    scores: list = field(default_factory=list)
    texts: list = field(default_factory=list)


RECORDS: dict[str, type[Record]] = {"text": TextRecord, "greedy": GreedyRecord, "kept": KeptRecord}


def method_name(policy: str, budget: str) -> str:
    """Return the name of a policy at a budget, such as "tova@256", "dms@cr4" or "dense"."""
    return f"{policy}@{budget}" if budget else policy


def record_of(raw: dict[str, Any]) -> Record:
    """Convert a line to its record. Raises ConfigError that names the key which is missing or wrong."""
    names = [name.name for name in dataclasses.fields(Record)]
    if missing := [name for name in names if name not in raw]:
        raise ConfigError(f"not an evaluation record (missing keys: {', '.join(missing)})")
    for name in names:
        if not isinstance(raw[name], str):
            raise ConfigError(f"`{name}` must be text, got {shown(raw[name])}")
    kind = HyperscaleRecord if raw["task"].startswith(HYPERSCALE) else RECORDS.get(raw["task"], AnswerRecord)
    fields = {known.name: known for known in dataclasses.fields(kind)}
    required = [name for name, known in fields.items() if _has_no_default(known)]
    with naming(f"{raw['task']} of {method_name(raw['policy'], raw['budget'])}"):
        if missing := [name for name in required if name not in raw]:
            raise ConfigError(f"missing keys: {', '.join(missing)}")
        values = {name: value for name, value in raw.items() if name in fields}
        # `build` refuses NaN and infinity, but here they are measurements of a model that diverged.
        odd = {name: value for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
        return dataclasses.replace(build(kind, values | dict.fromkeys(odd, 0.0)), **odd)


def _has_no_default(known: dataclasses.Field) -> bool:
    return known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING


def _require_numbers(record: Record, *names: str, dimensions: int = 1) -> None:
    """Require a list of at least one number, or a list of such lists of equal length. NaN is allowed."""
    for name in names:
        try:
            array = np.asarray(getattr(record, name))
        except (ValueError, OverflowError):
            array = np.empty(0)
        if array.dtype.kind not in "iuf" or array.ndim != dimensions or not array.size:
            kind = "a list of numbers" if dimensions == 1 else "a table of numbers"
            raise ConfigError(f"`{name}` must be {kind}, got {shown(getattr(record, name))}")
