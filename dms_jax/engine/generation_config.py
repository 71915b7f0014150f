"""The settings of `generate`, which are checked on construction, before a model is loaded. Imports no JAX."""

import math
import os
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from dms_jax.config import OVERFLOWS, Overflow
from dms_jax.config_reader import MAX_INT, Above, AtLeast, Range, check_ranges
from dms_jax.errors import ConfigError, naming, shown
from dms_jax.files import read_json

# The settings that `sampling_defaults` reads; without do_sample, only the penalty applies.
SAMPLED = ("temperature", "top_k", "top_p", "min_p")
SAMPLING = (*SAMPLED, "repetition_penalty")
# Settings that transformers follows and `generate` does not, with the value at which they have no effect
IGNORED = {
    "num_beams": 1,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "penalty_alpha": 0.0,
}


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of `generate`. Every number may change from call to call without compiling again, except `capacity`.

    Raises ConfigError for a value outside its range.
    """

    max_new_tokens: Annotated[int, AtLeast(1), "tokens per row"] = 128
    temperature: Annotated[float, AtLeast(0), "0 is greedy"] = 0.0
    top_k: Annotated[int, AtLeast(0), "sample among the k likeliest tokens; 0: off"] = 0
    top_p: Annotated[
        float,
        Range(0, 1, exclusive_min=True),
        "sample among the likeliest tokens that together have this probability; 1: off",
    ] = 1.0
    min_p: Annotated[
        float, Range(0, 1, exclusive_max=True), "drop tokens less likely than this times the likeliest; 0: off"
    ] = 0.0
    repetition_penalty: Annotated[
        float, Above(0), "make all tokens that the cache has seen less likely: of prompt, answer, earlier turns; 1: off"
    ] = 1.0
    stop_ids: tuple[int, ...] | None = None  # None: the ends of text of model and tokenizer (`stop_ids`); (): none
    stop_strings: tuple[str, ...] = ()  # need a tokenizer; one that is a special token stops by its id
    append_stop_id: bool = True  # False: the cache ends before the stop id, so that text can come in between
    seed: int | tuple[int, ...] = 0  # one for all rows, combined with the row's index; or one per row
    logprobs: bool = False  # also return each token's log p under the model itself, at temperature 1
    cache: Literal["pages", "slots"] | None = None  # None: see `uses_pages`
    max_length: Annotated[int, AtLeast(1), "tokens of each row that the tables of pages are made for"] | None = None
    capacity: int | tuple[int, ...] | None = None  # slots per row and KV head; None: see `plan_capacity`
    overflow: Overflow | None = None  # what a full buffer does; None: "grow" for pages, for slots see `init_cache`
    chunk_size: Annotated[int, AtLeast(1), "tokens per chunk of the prefill"] | None = None
    threshold: float = 0.0  # a token evicts iff its logit exceeds it; see `calibrate`
    dense: bool = False  # equivalent to policy="dense"
    policy: Any = None  # a CachePolicy or its name ("tova:256", "prompt:tova:256"); None: the model's own

    def __post_init__(self):
        check_ranges(self)
        ids = () if self.stop_ids is None else self.stop_ids
        seeds = self.seed if isinstance(self.seed, tuple | list) else (self.seed,)
        strings = self.stop_strings if isinstance(self.stop_strings, tuple | list) else [None]
        for name, rule, holds in (
            ("threshold", "a number", _is_number(self.threshold)),
            ("temperature", "a number", _is_number(self.temperature)),  # an int may be larger than any float
            ("repetition_penalty", "a number", _is_number(self.repetition_penalty)),
            ("cache", "pages or slots", self.cache in (None, "pages", "slots")),
            ("overflow", f"one of {', '.join(OVERFLOWS)}", self.overflow is None or self.overflow in OVERFLOWS),
            ("stop_strings", "a tuple of non-empty strings", all(isinstance(s, str) and s for s in strings)),
            ("stop_ids", "a tuple of token ids", isinstance(ids, tuple | list) and all(map(_is_id, ids))),
            ("append_stop_id", "true or false", isinstance(self.append_stop_id, bool)),
            ("seed", "whole numbers from 0 to 2**32 - 1", all(_is_whole(s) and 0 <= s < 2**32 for s in seeds)),
        ):
            if not holds:
                raise ConfigError(f"{name} must be {rule}, got {shown(getattr(self, name))}")


def sampling_defaults(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return how the authors of a model sample from it: the settings in its generation_config.json that have an effect.

    As in transformers, temperature, top_k, top_p and min_p count only if `do_sample` is true; the repetition penalty
    always does. The result is empty for a GGUF file and for a folder without that file. Each value is in the range of
    its field in `GenerationConfig`.
    """
    path = os.path.join(folder, "generation_config.json")
    raw = read_json(path) if os.path.isdir(folder) and os.path.lexists(path) else {}
    if raw.get("do_sample") not in (None, True, False):
        raise ConfigError(f"{path}: do_sample must be true or false, got {shown(raw['do_sample'])}")
    if ignored := sorted(key for key in IGNORED if raw.get(key) not in (None, IGNORED[key], [], False)):
        warnings.warn(f"{path}: {', '.join(ignored)} have no effect here", stacklevel=2)
    names = SAMPLING if raw.get("do_sample") is True else SAMPLING[-1:]
    found = {name: raw[name] for name in names if raw.get(name) is not None}
    if found.get("top_k") == -1:  # as some files spell 0
        del found["top_k"]
    with naming(path):
        GenerationConfig(**found)
    if raw.get("do_sample") is True:
        found.setdefault("temperature", 1.0)
    return {name: value for name, value in found.items() if value != getattr(GenerationConfig, name)}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_whole(value) and abs(value) <= MAX_INT


def _is_number(value: Any) -> bool:
    """Infinities count: a threshold of inf never evicts."""
    return not math.isnan(value) if isinstance(value, float) else _is_id(value)
