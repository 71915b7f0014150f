"""`generate`: from prompts to tokens, by a prefill and the decode loop. Errors are `ConfigError`."""

import html
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.cache_base import Cache, TokenHistory, row_compression_ratios
from dms_jax.core.compact_cache import CompactCache
from dms_jax.engine.cache_capacity import (
    check_context,
    check_slots,
    host_bounds,
    plan_capacity,
    round_up,
    uses_pages,
)
from dms_jax.engine.decode_layout import unrolled
from dms_jax.engine.decode_loop import DecodeState, finite_rows, generate_segments, generated_tokens
from dms_jax.engine.decoding import init_cache, prefill_rows
from dms_jax.engine.generation_config import GenerationConfig
from dms_jax.engine.head_budgets import policy_for_rows
from dms_jax.engine.page_memory import pages_for
from dms_jax.engine.stop_ids import end_ids, split_stops
from dms_jax.engine.text_stream import trim_at_stop
from dms_jax.errors import ConfigError, shown
from dms_jax.hf.hf_tokenizer import Tokenizer, load_tokenizer, prompt_ids
from dms_jax.models.decoder import Decoder
from dms_jax.models.token_ids import check_ids
from dms_jax.platform_defaults import platform_defaults
from dms_jax.policies.prompt_compression import compress_prompt

MAX_FLOAT32 = float(jnp.finfo(jnp.float32).max)
STOP_ID_MULTIPLE = 8  # stop ids are padded to a multiple of this, so that another number of ids compiles nothing


@dataclass(frozen=True)
class Generation:
    """The results of one call, row by row. `cache` holds prompt and `tokens`, so the next turn can continue it.

    With `append_stop_id=False`, it does not hold the stop id that ended a row.
    """

    tokens: list[np.ndarray]  # int32, including the stop id that ended the row, if any
    texts: list[str] | None  # without stop id and stop string; None for prompts of token ids
    # "stop_id", "stop_string", "length", "cancelled" by `watch`, or "non_finite": the logits after the row's last token
    # have a NaN or an infinity, so no token can be chosen
    finish_reasons: list[str]
    logprobs: list[np.ndarray] | None  # log p of each token, if the config asks for it
    live_pairs: np.ndarray  # [B] mean over layers and heads
    realised_cr: np.ndarray  # [B] tokens seen / live pairs
    forced_evictions: np.ndarray  # [B] over all layers and heads
    pairs_read: np.ndarray  # [B] pairs that attention read, summed over generated tokens, mean over layers and heads
    cache: Cache = field(repr=False)
    logits: Float[Array, "B V"] = field(repr=False)  # after the last token

    def _repr_html_(self) -> str:
        """Show the texts, or the ids where there are none, and a line of counts in a notebook."""
        texts = [" ".join(map(str, row)) for row in self.tokens] if self.texts is None else self.texts
        items = "".join(f'<li style="white-space: pre-wrap">{html.escape(text)}</li>' for text in texts)
        return (
            f"<ol>{items}</ol><p><small>{sum(map(len, self.tokens))} new tokens; live pairs per head "
            f"{np.mean(self.live_pairs):.4g}, CR {np.mean(self.realised_cr):.3g}; "
            f"ended by {html.escape(', '.join(self.finish_reasons))}</small></p>"
        )

    @property
    def allocated_bytes(self) -> int:
        """Memory of all arrays of the cache."""
        return self.cache.bytes.allocated

    @property
    def live_bytes(self) -> int:
        """Keys and values of the live pairs."""
        return self.cache.bytes.live

    @property
    def dense_bytes(self) -> int:
        """Keys and values of all pairs that the rows have seen, which a dense cache would hold."""
        return self.cache.bytes.dense


class Progress(NamedTuple):
    """The progress of a call. The device has finished everything that is reported."""

    prefilled: int  # tokens of the longest prompt that the cache holds
    tokens: list[np.ndarray] | None  # generated so far, row by row; None during the prefill


def generate(
    model: Decoder,
    prompts: str | Sequence[str] | Sequence[Sequence[int]] | Sequence[np.ndarray] | Int[Array, "B T"],
    config: GenerationConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    cache: Cache | None = None,
    watch: Callable[[Progress], bool | None] | None = None,
) -> Generation:
    """Continue each prompt.

    Args:
      prompts: strings or token ids, of any lengths; none may be empty.
      config: the settings; greedy by default.
      tokenizer: for strings; by default the one in the model's folder.
      cache: the cache of an earlier turn to append to, with a row for each prompt. It stays usable. None makes a new
        cache.
      watch: called after each chunk of the prefill and every few tokens. If it returns True while tokens are generated,
        the call ends there, and the cache holds exactly the tokens that are returned. If it raises, the exception
        passes through, and a given `cache` stays usable.

    Raises ConfigError for arguments that cannot work, and, with overflow "raise", when a head needs more slots.
    """
    config = config or GenerationConfig()
    # 1. Check prompts and stop ids. Nothing below checks an id again.
    rows, tokenizer, as_text = _encode(model, prompts, config, tokenizer)
    stop_ids, stop_strings = _stops(model, config, tokenizer)
    threshold = config.threshold if abs(config.threshold) <= MAX_FLOAT32 else math.copysign(math.inf, config.threshold)
    config = replace(config, stop_strings=stop_strings, threshold=threshold)
    lengths, chunk = np.array([len(row) for row in rows]), config.chunk_size or platform_defaults().prefill_chunk
    # 2. Make the cache, and refuse sizes that could not work before any work is done.
    own = cache is None
    cache = _new_cache(model, config, lengths, chunk) if cache is None else cache
    _check_sizes(model, cache, lengths, config)
    history = _history(cache, config)
    history = history if history is None else history.extended(rows)
    # 3. Prefill, keep only the logits of each prompt's last token, and compress the prompts if the policy does so.
    on_chunk = None if watch is None else lambda done: watch(Progress(done, None))
    chunks, more = (_padded(rows), lengths, chunk, config.threshold), config.max_new_tokens
    logits, cache = prefill_rows(model, cache, *chunks, last_only=True, donate=own, watch=on_chunk, ahead=more)
    if isinstance(cache, CompactCache) and cache.policy.compresses_prompt:
        cache = compress_prompt(cache)
        cache = cache.with_bounds(host_bounds(cache))
    # 4. Decode segment by segment, until all rows have stopped or `watch` asks to.
    seen_ids = history.ids if history is not None else rows
    state, stopped_by_text = _first_state(cache, logits, seen_ids, config), np.zeros(len(rows), bool)
    segments = generate_segments(unrolled(model), state, config, stop_ids, tokenizer, watch is not None)
    for state, stopped_by_text in segments:  # noqa: B007  # the last ones are the result
        if watch is not None and watch(Progress(int(lengths.max()), generated_tokens(state))):
            break
    # 5. Read the results from the device.
    return _result(state, stopped_by_text, config, tokenizer if as_text else None, history)


def _new_cache(model: Decoder, config: GenerationConfig, lengths: np.ndarray, chunk: int) -> Cache:
    """Make a cache for prompts of these lengths and their answers."""
    policy = policy_for_rows(model, config.policy, config.dense, int(lengths.max()) + config.max_new_tokens)
    if uses_pages(model.config, model.embed.get_value().dtype, config, policy):
        sizes = lengths, config.max_new_tokens, config.max_length or 0, chunk
        return pages_for(model, *sizes, policy, config.overflow)
    capacity, overflow = plan_capacity(config.capacity, lengths, config.max_new_tokens, policy, config.overflow)
    return init_cache(model, len(lengths), capacity, policy=policy, overflow=overflow)


def _encode(model, prompts, config, tokenizer) -> tuple[list[np.ndarray], Tokenizer | None, bool]:
    """Return the checked ids of each prompt, the tokenizer if one is needed, and whether prompts were strings."""
    if not isinstance(prompts, str | Sequence | np.ndarray | jax.Array):
        raise ConfigError(f"prompts must be a list of strings or of token ids, got {shown(prompts)}")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ConfigError("there must be at least one prompt, got no prompts")
    as_text = isinstance(prompts[0], str)
    if any(isinstance(prompt, str) != as_text for prompt in prompts):
        raise ConfigError("prompts must be all strings or all token ids, got both")
    if tokenizer is None and (as_text or config.stop_strings):
        source = getattr(model, "source", None)
        if source is None:
            what = "string prompts" if as_text else "stop_strings"
            raise ConfigError(
                f"{what} need a tokenizer, and this model was not loaded from a folder; "
                "pass tokenizer=, or token ids and stop_ids"
            )
        tokenizer = load_tokenizer(source.path)
    rows = []
    for index, prompt in enumerate(prompts):
        row = prompt_ids(tokenizer, prompt) if as_text else _array(prompt, index)
        if not row.size:
            raise ConfigError(f"prompt {index} is empty; give at least one token")
        if row.ndim != 1:
            raise ConfigError(f"prompt {index} must be a list of token ids, got shape {list(row.shape)}")
        rows.append(check_ids(row, model.config.vocab_size, f"prompt {index}"))
    return rows, tokenizer, as_text


def _array(prompt, index: int) -> np.ndarray:
    """Return the ids of a prompt as an array; true and false among the ids become objects, which are refused."""
    ids = list(prompt) if isinstance(prompt, Sequence) else prompt
    flags = isinstance(ids, list) and any(isinstance(item, bool | np.bool_) for item in ids)
    try:
        return np.asarray(ids, object if flags else None)
    except ValueError as why:  # rows of different lengths in the place of ids
        raise ConfigError(f"prompt {index} must be a list of token ids, got {shown(prompt)}") from why


def _stops(model, config, tokenizer) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the ids that end a row, padded with -1, which is not a token id; and the strings that do."""
    special, strings = split_stops(tuple(config.stop_strings), tokenizer)
    given = end_ids(model.config, tokenizer) if config.stop_ids is None else tuple(config.stop_ids)
    ids = sorted(set(given + special))
    check_ids(np.array(ids, np.int64), model.config.vocab_size, "stop_ids")
    size = -(-max(len(ids), 1) // STOP_ID_MULTIPLE) * STOP_ID_MULTIPLE
    return np.array(ids + [-1] * (size - len(ids)), np.int32), strings


def _history(cache: Cache, config: GenerationConfig) -> TokenHistory | None:
    """Return the tokens that the cache has seen, before the arrays of the cache are given away."""
    if cache.history is None and config.repetition_penalty != 1:
        warnings.warn(
            "the repetition penalty knows the tokens of this call only, because this cache does not say which tokens "
            "it has seen: decode_step or an old file made it; prefill the tokens again, or use repetition_penalty=1",
            stacklevel=3,
        )
    return cache.history


def _check_sizes(model, cache, lengths, config) -> None:
    """Refuse a batch size, lengths, a capacity or seeds that cannot work."""
    if cache.batch_size != len(lengths):
        raise ConfigError(
            f"the cache must have one row for each prompt, got {cache.batch_size} rows for {len(lengths)} prompts; "
            "use dms_jax.fork, or give one prompt per row"
        )
    count = lengths + config.max_new_tokens
    check_context(model.config, cache, count)
    check_slots(cache, count, lengths, config.chunk_size)
    if isinstance(config.seed, tuple | list) and len(config.seed) != len(lengths):
        raise ConfigError(
            f"seed must be one number or one for each prompt, got {len(config.seed)} for {len(lengths)} prompts"
        )


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Return rows of different lengths as one array [B T], padded on the right."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _first_state(cache: Cache, logits: Array, seen_ids: Sequence[np.ndarray], config: GenerationConfig) -> DecodeState:
    """Return the state after the prefill. The space for new tokens is rounded up, so that few sizes are compiled."""
    num_rows, columns = len(seen_ids), round_up(config.max_new_tokens)
    seen_tokens = None
    if config.repetition_penalty != 1:
        seen_tokens = np.zeros(logits.shape, bool)
        for seen, ids in zip(seen_tokens, seen_ids, strict=True):
            seen[ids] = True
    return DecodeState(
        cache=cache,
        logits=logits,
        seen_tokens=seen_tokens,
        num_generated=jnp.zeros(num_rows, jnp.int32),
        tokens=jnp.zeros((num_rows, columns), jnp.int32),
        logprobs=jnp.zeros((num_rows, columns), jnp.float32),
        stopped=jnp.zeros(num_rows, bool),
        finite=finite_rows(logits),
        keys=_keys(config.seed, num_rows),
        pairs_read=jnp.zeros(num_rows, jnp.float32),
    )


def _keys(seed: int | tuple[int, ...], num_rows: int) -> Array:
    """Return a key for each row: from its own seed, or from the one seed and the row's index."""
    if isinstance(seed, tuple | list):
        return jax.vmap(jax.random.key)(np.array(seed, np.uint32))
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(np.uint32(seed)), jnp.arange(num_rows))


def _result(
    state: DecodeState,
    stopped_by_text: np.ndarray,
    config: GenerationConfig,
    tokenizer: Tokenizer | None,
    history: TokenHistory | None,
) -> Generation:
    """Read the state from the device; `tokenizer` is None for prompts of ids. `history` ends before the new tokens."""
    numbers, stopped, tokens = np.asarray(state.num_generated), np.asarray(state.stopped), generated_tokens(state)
    texts = logprobs = None
    without_end = [row[:-1] if id_ else row for row, id_ in zip(tokens, stopped, strict=True)]
    if tokenizer is not None:
        texts = [trim_at_stop(tokenizer.decode(row), config.stop_strings) for row in without_end]
    if config.logprobs:
        logprobs = [row[:number] for row, number in zip(np.asarray(state.logprobs), numbers, strict=True)]
    cache = state.cache
    if history is not None:
        cache = cache.with_history(history.extended(tokens if config.append_stop_id else without_end))
    return Generation(
        tokens=tokens,
        texts=texts,
        finish_reasons=_finish_reasons(state, stopped_by_text, config.max_new_tokens),
        logprobs=logprobs,
        live_pairs=np.asarray(cache.live_counts, np.float64).mean(axis=(0, 2)),
        realised_cr=row_compression_ratios(cache),
        forced_evictions=np.asarray(cache.forced_evictions).sum(axis=(0, 2)),
        pairs_read=np.asarray(state.pairs_read, np.float64),
        cache=cache,
        logits=state.logits,
    )


def _finish_reasons(state: DecodeState, stopped_by_text: np.ndarray, max_new_tokens: int) -> list[str]:
    reasons = []
    rows = zip(stopped_by_text, *map(np.asarray, (state.stopped, state.num_generated, state.finite)), strict=True)
    for text, stopped, number, finite in rows:
        if text or stopped:
            reasons.append("stop_string" if text else "stop_id")
        else:
            reasons.append("length" if number == max_new_tokens else "cancelled" if finite else "non_finite")
    return reasons
