"""What to generate and how: checked when it is written down, before any model runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dms_jax.config_reader import MAX_INT
from dms_jax.core.compact_cache import OVERFLOWS
from dms_jax.core.sampling import SamplingMode, SamplingNumbers
from dms_jax.errors import ConfigError, shown
from dms_jax.policies import CachePolicy


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of `generate`. Every number may change from call to call without compiling, except `capacity`."""

    max_new_tokens: int = 128  # >= 1, per row
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # in (0, 1]; 1: off
    min_p: float = 0.0  # in [0, 1): drop tokens less likely than min_p * the likeliest
    repetition_penalty: float = 1.0  # > 0; 1: off. Counts prompt and generated tokens of this call
    stop_ids: tuple[int, ...] | None = None  # None: the model's end-of-text ids; (): none
    stop_strings: tuple[str, ...] = ()  # need a tokenizer
    seed: int | tuple[int, ...] = 0  # one for all, from which each row derives its own by its index; or one per row
    logprobs: bool = False  # also return log p of each token, under the model itself (temperature 1, nothing cut)
    capacity: int | tuple[int, ...] | None = (
        None  # slots per head; None: enough for all tokens, or with "grow" as many as needed
    )
    overflow: str | None = None  # None: "evict", for a dense cache "raise"; see `init_cache`
    chunk_size: int | None = None  # of the prefill
    threshold: float = 0.0  # a token evicts iff its logit exceeds it; see `calibrate`
    dense: bool = False  # the same as policy="dense"
    policy: CachePolicy | str | None = (
        None  # who leaves the cache: "tova:256", "prompt:tova:256", ...; None: the model's own
    )

    def __post_init__(self):
        whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
        real = lambda x: (
            isinstance(x, int | float)
            and not isinstance(x, bool)
            and (not math.isnan(x) if isinstance(x, float) else abs(x) <= MAX_INT)
        )
        _check(
            whole(self.max_new_tokens) and 1 <= self.max_new_tokens <= MAX_INT,
            "max_new_tokens",
            self.max_new_tokens,
            "a whole number >= 1 (to fill a cache without generating, use prefill)",
        )
        _check(
            real(self.temperature) and 0 <= self.temperature < math.inf,
            "temperature",
            self.temperature,
            "a finite number >= 0 (0 is greedy)",
        )
        _check(whole(self.top_k) and 0 <= self.top_k <= MAX_INT, "top_k", self.top_k, "a whole number >= 0 (0 is off)")
        _check(
            real(self.top_p) and 0 < self.top_p <= 1,
            "top_p",
            self.top_p,
            "in (0, 1] (1 is off; for the likeliest token alone set temperature=0)",
        )
        _check(real(self.min_p) and 0 <= self.min_p < 1, "min_p", self.min_p, "in [0, 1) (0 is off)")
        _check(
            real(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            self.repetition_penalty,
            "a finite number > 0 (1 is off)",
        )
        _check(real(self.threshold), "threshold", self.threshold, "a number (0 is what training aimed at)")
        _check(
            self.overflow is None or self.overflow in OVERFLOWS,
            "overflow",
            self.overflow,
            f"one of {', '.join(OVERFLOWS)}",
        )
        _check(
            self.chunk_size is None or (whole(self.chunk_size) and 1 <= self.chunk_size <= MAX_INT),
            "chunk_size",
            self.chunk_size,
            "a whole number >= 1",
        )
        _check(
            isinstance(self.stop_strings, tuple | list) and all(isinstance(s, str) and s for s in self.stop_strings),
            "stop_strings",
            self.stop_strings,
            "a tuple of strings that are not empty",
        )
        ids = () if self.stop_ids is None else self.stop_ids
        _check(
            isinstance(ids, tuple | list) and all(whole(i) and abs(i) <= MAX_INT for i in ids),
            "stop_ids",
            ids,
            "a tuple of token ids",
        )
        seeds = self.seed if isinstance(self.seed, tuple | list) else (self.seed,)
        _check(all(whole(s) and 0 <= s < 2**32 for s in seeds), "seed", self.seed, "whole numbers from 0 to 2**32 - 1")

    @property
    def mode(self) -> SamplingMode:
        greedy = self.temperature == 0
        return SamplingMode(greedy, not greedy and (self.top_k > 0 or self.top_p < 1), self.repetition_penalty != 1)

    @property
    def numbers(self) -> SamplingNumbers:
        return SamplingNumbers(self.temperature or 1.0, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def _check(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {rule}; got {shown(value)}")
