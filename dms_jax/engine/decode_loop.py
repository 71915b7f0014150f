"""The decode loop: it samples and appends until every row has stopped, run in segments. It is one jitted program, or on
a CPU a loop on the host over programs for single layers, which compile in a tenth of the time.

A segment ends when the host has work to do: to search the text for stop strings, to grow the cache, or to report
progress. A segment that ran past a stop string is run again from the cache before the segment, now with the right
number of tokens, so that the cache holds exactly the tokens that are returned.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.core.cache_base import Cache
from dms_jax.core.compact_cache import CompactCache
from dms_jax.core.sampling import MAX_LOGIT, MIN_DIVISOR, SamplingMode, SamplingNumbers, sample, token_logprobs
from dms_jax.engine.cache_capacity import check_overflow, grow_for, host_bounds
from dms_jax.engine.decode_layout import UnrolledDecoder
from dms_jax.engine.decoding import copied, extend_rows
from dms_jax.engine.generation_config import GenerationConfig
from dms_jax.engine.text_stream import find_stop
from dms_jax.hf.hf_tokenizer import Tokenizer
from dms_jax.sharding import mesh_of

SEGMENT = 16  # tokens in a segment if the host has to search for stop strings or grow the cache
WATCHED_SEGMENT = 4  # tokens between two calls of `watch`: few enough for smooth text, many enough to be cheap


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The state that the loop carries from token to token."""

    cache: Cache
    logits: Float[Array, "B V"]  # after the last token
    seen_tokens: Bool[Array, "B V"] | None  # ids in prompt or answer; None without a repetition penalty
    num_generated: Int[Array, "B"]
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    stopped: Bool[Array, "B"]  # whether the row has ended at a stop id
    finite: Bool[Array, "B"]  # whether `logits` are finite; a row whose logits are not ends, because it cannot sample
    keys: Array  # [B]
    pairs_read: Float[Array, "B"]  # summed over the generated tokens, mean over layers and heads


def generated_tokens(state: DecodeState) -> list[np.ndarray]:
    """Return the tokens of each row so far, as copies: the loop may reuse its arrays."""
    rows = zip(np.asarray(state.tokens), np.asarray(state.num_generated), strict=True)
    return [row[:number].copy() for row, number in rows]


def sampling_of(config: GenerationConfig) -> tuple[SamplingMode, SamplingNumbers]:
    """Return the static and the traced part of the sampling settings."""
    greedy = config.temperature <= MIN_DIVISOR
    sorts = not greedy and (config.top_k > 0 or config.top_p < 1)
    mode = SamplingMode(greedy, sorts, config.repetition_penalty != 1)
    large = (1.0 if greedy else config.temperature, config.repetition_penalty)
    temperature, penalty = (jnp.float32(min(number, MAX_LOGIT)) for number in large)
    return mode, SamplingNumbers(
        temperature, jnp.int32(config.top_k), jnp.float32(config.top_p), jnp.float32(config.min_p), penalty
    )


def generate_segments(
    model: UnrolledDecoder,
    state: DecodeState,
    config: GenerationConfig,
    stop_ids: np.ndarray,
    tokenizer: Tokenizer | None,
    watched: bool,
) -> Iterator[tuple[DecodeState, np.ndarray]]:
    """Generate segment by segment. Yield the state after each, and which rows [B] a stop string has ended.

    The next segment may reuse the memory of a yielded state, so only the last one stays valid.
    """
    limit, until = np.full(len(state.num_generated), config.max_new_tokens, np.int32), 0
    stopped_by_text = np.zeros(len(limit), bool)
    while until < config.max_new_tokens:
        start, until = until, until + _segment_length(state.cache, config, until, watched)
        rest = config.max_new_tokens - start
        state = replace(state, cache=grow_for(model.config, state.cache, until - start, rest, donate=True))
        before = host_bounds(state.cache)
        after = _run_segment(model, state, until, limit, stop_ids, config)
        if config.stop_strings:
            assert tokenizer is not None  # checked in `generation.generate`
            ends = _stop_string_ends(after, tokenizer, config.stop_strings)
            stopped_by_text, limit = ends >= 0, np.where(ends >= 0, ends, limit)
            if (limit < np.asarray(after.num_generated)).any():
                after = _run_segment(model, state, until, limit, stop_ids, config)
        state = replace(after, cache=check_overflow(after.cache, before, until - start))
        yield state, stopped_by_text
        if until < config.max_new_tokens and not _active(state, limit).any():
            break


def _active(state: DecodeState, limit: np.ndarray) -> np.ndarray:
    return ~np.asarray(state.stopped) & np.asarray(state.finite) & (np.asarray(state.num_generated) < limit)


def _segment_length(cache: Cache, config: GenerationConfig, until: int, watched: bool) -> int:
    """Choose the number of tokens in the next segment: all that are left, unless the host has work to do earlier."""
    length = config.max_new_tokens - until
    if config.stop_strings:
        length = min(length, SEGMENT)
    if watched:
        length = min(length, WATCHED_SEGMENT if until else 1)  # the first token is shown at once
    if cache.overflow == "grow":
        known = host_bounds(cache)
        free = known.tokens
        if isinstance(cache, CompactCache):
            free = min(capacity - live for capacity, live in zip(cache.capacities, known.live, strict=True))
        length = min(length, max(free, SEGMENT))
    return length


def _run_segment(model, state, until: int, limit: np.ndarray, stop_ids: np.ndarray, config) -> DecodeState:
    mode, numbers = sampling_of(config)
    append, threshold = np.bool_(config.append_stop_id), jnp.float32(config.threshold)
    arguments = model, state, np.int32(until), limit, stop_ids, append, threshold, numbers, mode
    donate = not config.stop_strings  # only a stop string makes a segment run again
    with mesh_of(model.embed):
        return (
            _by_layer(*arguments, donate) if model.runs_by_layer else (_loop_donated if donate else _loop)(*arguments)
        )


def _stop_string_ends(state: DecodeState, tokenizer: Tokenizer, stops: tuple[str, ...]) -> np.ndarray:
    """Return how many tokens [B] complete the first stop string of each row; -1 for a row without one."""

    def has_stop(tokens: np.ndarray) -> bool:
        return find_stop(tokenizer.decode(tokens), stops) is not None

    ends = [
        next(n for n in range(1, len(row) + 1) if has_stop(row[:n])) if has_stop(row) else -1
        for row in generated_tokens(state)
    ]
    return np.array(ends, np.int32)


def _loop_body(
    model: UnrolledDecoder,
    state: DecodeState,
    until: Array,
    limit: Array,
    stop_ids: Array,
    append_stop_id: Array,
    threshold: Array,
    numbers: SamplingNumbers,
    mode: SamplingMode,
) -> DecodeState:
    """Sample and append until every row has stopped or has `min(until, limit)` tokens. A finished row is frozen."""
    bound = jnp.minimum(until, limit)
    step = partial(_one_token, model, bound, stop_ids, append_stop_id, threshold, numbers, mode)
    return lax.while_loop(lambda state: jnp.any(_going(state, bound)), step, state)


def _by_layer(model, state, until, limit, stop_ids, append_stop_id, threshold, numbers, mode, donate) -> DecodeState:
    """Do what `_loop_body` does, but on the host, for a model that runs layer by layer."""
    bound = np.minimum(until, limit)
    if not donate:
        state = replace(state, cache=copied(state.cache))  # its memory is given away
    while _active(state, bound).any():  # waits for the device, which on a CPU costs nothing
        state = _one_token(model, bound, stop_ids, append_stop_id, threshold, numbers, mode, state)
    return state


def _one_token(model, bound, stop_ids, append_stop_id, threshold, numbers, mode, state: DecodeState) -> DecodeState:
    """Sample one token for each row that goes on, and append it."""
    without_cache = replace(state, cache=cast(Any, None))  # so that the cache does not pass through these programs
    token, appended, going, chosen = _choose(without_cache, bound, stop_ids, append_stop_id, numbers, mode)
    logits, cache = extend_rows(model, state.cache, token, appended, threshold, state.logits)
    return replace(_after_token(chosen, logits, cache, going), cache=cache)


@partial(jax.jit, static_argnames="mode")
def _choose(state, bound, stop_ids, append_stop_id, numbers, mode):
    """Return the next token [B 1], whether it is appended [B], which rows go on [B], and the state with the token."""
    going = _going(state, bound)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.num_generated)
    token = sample(state.logits, keys, state.seen_tokens, numbers, mode)
    stops = going & jnp.any(token[:, None] == stop_ids[None], axis=1)
    rows = jnp.arange(len(token))
    # A frozen row writes to a column that does not exist, so its write is dropped.
    column = jnp.where(going, state.num_generated, state.tokens.shape[1])
    chosen = replace(
        state,
        seen_tokens=None if state.seen_tokens is None else state.seen_tokens.at[rows, token].max(going),
        num_generated=state.num_generated + going.astype(jnp.int32),
        tokens=state.tokens.at[rows, column].set(token, mode="drop"),
        logprobs=state.logprobs.at[rows, column].set(token_logprobs(state.logits, token), mode="drop"),
        stopped=state.stopped | stops,
    )
    return token[:, None], (going & (append_stop_id | ~stops)).astype(jnp.int32), going, chosen


@jax.jit
def _after_token(state: DecodeState, logits: Array, cache: Cache, going: Array) -> DecodeState:
    """Return the state after the chosen tokens were appended to `cache`."""
    read = state.pairs_read + jnp.where(going, _pairs_read(cache), 0.0)
    return replace(state, logits=logits, finite=finite_rows(logits), pairs_read=read)


def _going(state: DecodeState, bound: Array) -> Bool[Array, "B"]:
    return ~state.stopped & state.finite & (state.num_generated < bound)


def finite_rows(logits: Float[Array, "B V"]) -> Bool[Array, "B"]:
    """Return for each row whether all of its logits are finite."""
    return jnp.all(jnp.isfinite(logits), axis=-1)


def _pairs_read(cache: Cache) -> Float[Array, "B"]:
    return jnp.mean(cache.policy.pairs_read(cache.live_counts.astype(jnp.float32)), axis=(0, 2))


_loop = jax.jit(_loop_body, static_argnames="mode")
_loop_donated = jax.jit(_loop_body, static_argnames="mode", donate_argnames="state")


def num_loop_compilations() -> int:
    """Count the programs that the loop has compiled so far."""
    programs = _loop, _loop_donated, _choose, _after_token
    return sum(program._cache_size() for program in programs)  # pyrefly: ignore[missing-attribute]
