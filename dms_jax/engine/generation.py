"""Generate: prefill, then one jitted loop in which each row stops by itself.

The loop runs in stretches when the host has something to look at: stop strings, caches that grow, somebody who watches. A stretch
that ran past a stop string is run again with the limit known, from the cache before it, so the returned cache holds exactly
the returned tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import CompactCache, row_compression_ratios
from dms_jax.core.sampling import SamplingMode, SamplingNumbers, sample, token_logprobs
from dms_jax.engine.cache_capacity import bounds, check_context, check_forced, check_room, round_up, with_room
from dms_jax.engine.decode_layout import UnrolledDecoder, unrolled
from dms_jax.engine.decoding import extend_rows, init_cache, prefill
from dms_jax.engine.generation_config import GenerationConfig, find_stop
from dms_jax.errors import ConfigError
from dms_jax.hf.hf_tokenizer import Tokenizer, load_tokenizer, prompt_ids
from dms_jax.models.decoder import Decoder
from dms_jax.policies import PromptCompression, policy_of
from dms_jax.policies.prompt_compression import compress_prompt
from dms_jax.sharding import mesh_of

STRETCH = 16  # tokens between two looks of the host, when it has to look
WATCHED_STRETCH = 4  # tokens between two calls of `watch`: a reader sees no jumps, and the loop is left rarely
MOST_STOP_IDS = 8  # ids are padded to a multiple of it, so that their number compiles nothing


@dataclass(frozen=True)
class Generation:
    """What came out, row by row. `cache` has seen prompt and all `tokens`: prefill the next turn into it."""

    tokens: list[np.ndarray]  # int32; a stop id, when one came, is the last
    texts: list[str] | None  # for prompts that were strings: without stop id and stop string
    finish_reasons: list[str]  # "stop_id", "stop_string", "length", or "cancelled" by `watch`
    logprobs: list[np.ndarray] | None  # log p of each token
    live_pairs: np.ndarray  # [B] mean over layers and heads
    realised_cr: np.ndarray  # [B] tokens seen / live pairs
    forced_evictions: np.ndarray  # [B] over all layers and heads
    pairs_read: np.ndarray  # [B] by the attention of the generated tokens, summed over them, mean over layers and heads
    cache: CompactCache
    logits: Float[Array, "B V"]  # after the last token


class Progress(NamedTuple):
    """Where a call stands: what is reported is done on the device, not only asked for."""

    prefilled: int  # tokens of the longest prompt that the cache holds
    tokens: list[np.ndarray] | None  # generated so far, row by row; None during the prefill


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    cache: CompactCache
    logits: Float[Array, "B V"]
    used: Bool[Array, "B V"] | None
    made: Int[Array, "B"]  # tokens generated so far
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    stopped: Bool[Array, "B"]  # met a stop id
    keys: Array  # [B]
    read: Float[Array, "B"]


def generate(
    model: Decoder,
    prompts: str | Sequence[str] | Sequence[Sequence[int]] | Int[Array, "B T"],
    config: GenerationConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    cache: CompactCache | None = None,
    watch: Callable[[Progress], bool | None] | None = None,
) -> Generation:
    """Continue each prompt.

    Args:
      prompts: strings, or token ids, of any lengths; none may be empty.
      config: how; greedy by default.
      tokenizer: for strings; by default the one in the model's folder.
      cache: of an earlier turn, with a row for each prompt: the prompts are appended to it. It stays usable. None starts anew.
      watch: called after each chunk of the prefill and every few tokens. True, while tokens are generated, ends the call there,
        with a cache of exactly the tokens returned; what it raises passes through, and a `cache` that was given is untouched.

    Raises ConfigError for settings, prompts and sizes that cannot work, and, under overflow "raise", when a head needs more.
    """
    config = config or GenerationConfig()
    ids, tokenizer, as_text = _encode(model, prompts, config, tokenizer)
    stop_ids = _stop_ids(model, config)
    lengths = np.array([len(row) for row in ids])
    cache, own = (_new_cache(model, lengths, config), True) if cache is None else (cache, False)
    if cache.batch_size != len(ids):
        raise ConfigError(
            f"this cache has {cache.batch_size} rows, there are {len(ids)} prompts; use fork, or one prompt per row"
        )
    _check_total(model, cache, lengths, config)
    padded = np.zeros((len(ids), lengths.max()), np.int32)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    logits, cache = prefill(
        model,
        cache,
        padded,
        lengths,
        config.chunk_size,
        threshold=config.threshold,
        last_only=True,
        donate=own,
        watch=None if watch is None else lambda done: watch(Progress(done, None)),
    )
    if isinstance(cache.policy, PromptCompression):
        cache = compress_prompt(cache)
    known = bounds(cache)
    columns = round_up(config.max_new_tokens)
    rows = len(ids)
    state = _State(
        cache,
        logits,
        _used(padded, lengths, model.config.vocab_size) if config.mode.penalizes else None,
        jnp.zeros(rows, jnp.int32),
        jnp.zeros((rows, columns), jnp.int32),
        jnp.zeros((rows, columns), jnp.float32),
        jnp.zeros(rows, bool),
        _keys(config, rows),
        jnp.zeros(rows, jnp.float32),
    )
    state = replace(state, cache=replace(cache, bounds=known))
    run = _Run(unrolled(model), config, stop_ids, tokenizer, watch, int(lengths.max()))
    state, cut = run.to_the_end(state, rows)
    return _result(state, cut, config, tokenizer, as_text)


class _Run:
    """The stretches of one call."""

    def __init__(
        self,
        model: UnrolledDecoder,
        config: GenerationConfig,
        stop_ids: np.ndarray,
        tokenizer: Tokenizer | None,
        watch: Callable | None,
        longest: int,
    ):
        self.model, self.config, self.stop_ids, self.tokenizer, self.watch, self.longest = (
            model,
            config,
            stop_ids,
            tokenizer,
            watch,
            longest,
        )

    def to_the_end(self, state: _State, rows: int) -> tuple[_State, np.ndarray]:
        """The final state, and which rows [B] ended with a stop string."""
        config, limit, until = self.config, np.full(rows, self.config.max_new_tokens, np.int32), 0
        cut = np.zeros(rows, bool)
        while until < config.max_new_tokens:
            start, until = until, self._next_look(state.cache, until)
            cache = with_room(state.cache, until - start)
            before = bounds(cache)
            state = replace(state, cache=cache)
            after = self._stretch(state, until, limit, keep=bool(config.stop_strings))
            if config.stop_strings:
                ends = self._stop_strings(after)
                cut, limit = ends >= 0, np.where(ends >= 0, ends, limit)
                if (limit < np.asarray(after.made)).any():
                    after = self._stretch(state, until, limit, keep=True)
            state = replace(after, cache=check_forced(after.cache, before, until - start))
            if self.watch is not None and self.watch(Progress(self.longest, _made(state))):
                break
            if until < config.max_new_tokens and bool(
                np.all(np.asarray(state.stopped) | (np.asarray(state.made) >= limit))
            ):
                break
        return state, cut

    def _next_look(self, cache: CompactCache, until: int) -> int:
        """How far the loop may run: to the end, unless the host has to look before."""
        stretch = self.config.max_new_tokens - until
        if self.config.stop_strings:
            stretch = min(stretch, STRETCH)
        if self.watch is not None:
            stretch = min(stretch, WATCHED_STRETCH)
        if cache.overflow == "grow":
            room = min(capacity - live for capacity, live in zip(cache.capacities, bounds(cache).live, strict=True))
            stretch = min(stretch, max(room, STRETCH))
        return until + stretch

    def _stretch(self, state: _State, until: int, limit: np.ndarray, keep: bool) -> _State:
        step = _loop if keep else _loop_donated
        numbers = SamplingNumbers(*map(jnp.asarray, self.config.numbers))
        with mesh_of(self.model.embed):
            return step(
                self.model,
                state,
                np.int32(until),
                limit,
                self.stop_ids,
                jnp.float32(self.config.threshold),
                numbers,
                self.config.mode,
            )

    def _stop_strings(self, state: _State) -> np.ndarray:
        """How many tokens [B] complete the first stop string of each row; -1 where none has come."""
        assert self.tokenizer is not None  # stop strings need one: `_encode`
        found = np.full(len(state.made), -1, np.int32)
        for row, (tokens, made) in enumerate(zip(np.asarray(state.tokens), np.asarray(state.made), strict=True)):
            stops = lambda n: find_stop(self.tokenizer.decode(tokens[:n]), self.config.stop_strings) is not None  # noqa: B023
            if stops(made):
                found[row] = next(n for n in range(1, made + 1) if stops(n))
        return found


def _loop_body(
    model: UnrolledDecoder,
    state: _State,
    until: Array,
    limit: Array,
    stop_ids: Array,
    threshold: Array,
    numbers: SamplingNumbers,
    mode: SamplingMode,
) -> _State:
    """Sample and append, until every row has stopped or made `min(until, limit)` tokens. Rows that are done are frozen."""

    def active(state):
        return ~state.stopped & (state.made < jnp.minimum(until, limit))

    def one(state):
        going = active(state)
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.made)
        token = sample(state.logits, keys, state.used, numbers, mode)
        rows = jnp.arange(len(token))
        column = jnp.where(
            going, state.made, state.tokens.shape[1]
        )  # no such column: the write of a frozen row is dropped
        logits, cache = extend_rows(
            model, state.cache, token[:, None], going.astype(jnp.int32), threshold, state.logits
        )
        return _State(
            cache,
            logits,
            None if state.used is None else state.used.at[rows, token].max(going),
            state.made + going,
            state.tokens.at[rows, column].set(token, mode="drop"),
            state.logprobs.at[rows, column].set(token_logprobs(state.logits, token), mode="drop"),
            state.stopped | (going & jnp.any(token[:, None] == stop_ids, axis=1)),
            state.keys,
            state.read
            + jnp.where(
                going, jnp.mean(cache.policy.pairs_read(cache.live_counts.astype(jnp.float32)), axis=(0, 2)), 0.0
            ),
        )

    return lax.while_loop(lambda state: jnp.any(active(state)), one, state)


_loop = jax.jit(_loop_body, static_argnames="mode")
_loop_donated = jax.jit(_loop_body, static_argnames="mode", donate_argnames="state")


def num_loop_compilations() -> int:
    """Programs compiled so far by `generate`'s loop."""
    return _loop._cache_size() + _loop_donated._cache_size()  # pyrefly: ignore[missing-attribute]  # not in the stub of jit


def _encode(model, prompts, config, tokenizer) -> tuple[list[np.ndarray], Tokenizer | None, bool]:
    """Ids of each row; the tokenizer, where one is needed; whether the prompts were text."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ConfigError("there are no prompts")
    as_text = isinstance(prompts[0], str)
    if any(isinstance(prompt, str) != as_text for prompt in prompts):
        raise ConfigError("prompts must be all strings or all token ids")
    if tokenizer is None and (as_text or config.stop_strings):
        source = getattr(model, "source", None)
        if source is None:
            what = "string prompts" if as_text else "stop_strings"
            raise ConfigError(
                f"{what} need a tokenizer, and this model came from no folder; pass tokenizer=, or token ids and stop_ids"
            )
        tokenizer = load_tokenizer(source.path)
    rows = (
        [prompt_ids(tokenizer, prompt) for prompt in prompts] if as_text else [np.asarray(prompt) for prompt in prompts]
    )
    for index, row in enumerate(rows):
        if row.ndim != 1 or not row.size:
            raise ConfigError(
                f"prompt {index} is empty; give at least one token"
                if not row.size
                else f"prompt {index} is no list of token ids"
            )
        if not np.issubdtype(row.dtype, np.integer) or row.min() < 0 or row.max() >= model.config.vocab_size:
            raise ConfigError(
                f"prompt {index} holds {row.max()!s}, no token id of this model's vocabulary (0 to {model.config.vocab_size - 1})"
            )
    return [row.astype(np.int32) for row in rows], tokenizer, as_text


def _stop_ids(model, config) -> np.ndarray:
    """The ids that end a row, padded with -1, which no token is."""
    ids = sorted(set(model.config.eos_token_ids if config.stop_ids is None else config.stop_ids))
    if bad := [i for i in ids if not 0 <= i < model.config.vocab_size]:
        raise ConfigError(
            f"stop id {bad[0]} is outside this model's vocabulary of {model.config.vocab_size} (0 to {model.config.vocab_size - 1})"
        )
    size = -(-max(len(ids), 1) // MOST_STOP_IDS) * MOST_STOP_IDS
    return np.array(ids + [-1] * (size - len(ids)), np.int32)


def _new_cache(model, lengths, config) -> CompactCache:
    capacity = config.capacity
    if capacity is None:
        capacity = round_up(int(lengths.max()) + config.max_new_tokens)
        limits = policy_of(model.config, "dense" if config.dense else config.policy).slot_bounds()
        if limits.max is not None or config.overflow == "grow":
            capacity = min(capacity, round_up(limits.max or 2 * limits.min))
    return init_cache(model, len(lengths), capacity, policy=config.policy, overflow=config.overflow, dense=config.dense)


def _check_total(model, cache, lengths, config) -> None:
    """Refuse before the work what cannot work at its end."""
    count = lengths + config.max_new_tokens
    check_context(model.config, cache, count)
    check_room(cache, int(count.max()))
    if isinstance(config.seed, tuple | list) and len(config.seed) != len(lengths):
        raise ConfigError(
            f"seed lists {len(config.seed)} rows, there are {len(lengths)} prompts; give one number, or {len(lengths)}"
        )


def _keys(config, rows) -> Array:
    if isinstance(config.seed, tuple | list):
        return jax.vmap(jax.random.key)(np.array(config.seed, np.uint32))
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(np.uint32(config.seed)), jnp.arange(rows))


def _used(padded, lengths, vocab_size) -> np.ndarray:
    used = np.zeros((len(padded), vocab_size), bool)
    for row, tokens, length in zip(used, padded, lengths, strict=True):
        row[tokens[:length]] = True
    return used


def _made(state: _State) -> list[np.ndarray]:
    """The tokens of each row so far; copies, because the loop may reuse the arrays."""
    return [row[:n].copy() for row, n in zip(np.asarray(state.tokens), np.asarray(state.made), strict=True)]


def _result(state, cut, config, tokenizer, as_text) -> Generation:
    made, stopped, tokens = np.asarray(state.made), np.asarray(state.stopped), _made(state)
    reasons = [
        "stop_string" if string else "stop_id" if stop else "length" if n == config.max_new_tokens else "cancelled"
        for stop, string, n in zip(stopped, cut, made, strict=True)
    ]
    texts = None
    if as_text:
        texts = [tokenizer.decode(row[:-1] if stop else row) for row, stop in zip(tokens, stopped, strict=True)]
        texts = [text[: find_stop(text, config.stop_strings)] for text in texts]
    cache = state.cache
    return Generation(
        tokens,
        texts,
        reasons,
        [row[:n] for row, n in zip(np.asarray(state.logprobs), made, strict=True)] if config.logprobs else None,
        np.asarray(cache.live_counts, np.float64).mean(axis=(0, 2)),
        row_compression_ratios(cache),
        np.asarray(cache.forced_evictions).sum(axis=(0, 2)),
        np.asarray(state.read, np.float64),
        cache,
        state.logits,
    )
