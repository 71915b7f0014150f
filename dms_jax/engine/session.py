"""The session of one `generate` command, which its three modes share: model, settings, and the costs so far."""

import argparse
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dms_jax
from dms_jax.command import one_line
from dms_jax.core.cache_base import Cache, fork
from dms_jax.core.paged_cache import PagedCache
from dms_jax.engine.cache_capacity import plan_capacity, uses_pages
from dms_jax.engine.decode_layout import unrolled
from dms_jax.engine.decoding import select_policy
from dms_jax.engine.generation import Generation, Progress, generate
from dms_jax.engine.generation_config import SAMPLED, SAMPLING, GenerationConfig, sampling_defaults
from dms_jax.engine.generation_report import Report
from dms_jax.engine.head_budgets import policy_for_rows
from dms_jax.engine.prompts import NOT_ENDED, Encoder, Prompt
from dms_jax.engine.stop_ids import end_ids, origins, split_stops
from dms_jax.engine.stopwatch import Clock
from dms_jax.engine.text_stream import REPLACEMENT, TextStream, trim_at_stop
from dms_jax.errors import ConfigError
from dms_jax.hf.folder import resolve
from dms_jax.hf.hf_tokenizer import Tokenizer
from dms_jax.hf.open_model import open_model
from dms_jax.hf.safetensors_files import shorten
from dms_jax.models.decoder import Decoder
from dms_jax.platform_defaults import default_dtype
from dms_jax.policies import policy_name


class Cancelled(Exception):
    """The user has stopped the prefill; no cache has changed."""


@dataclass(frozen=True)
class Session:
    """A model and the settings to generate with. Only `report` changes: it sums the costs of all calls."""

    options: argparse.Namespace
    config: GenerationConfig
    model: Decoder
    tokenizer: Tokenizer
    loaded: Cache | None  # the cache that --load-cache names
    report: Report
    defaults: dict[str, Any]  # the sampling settings that come from the model's generation_config.json

    def encoder(self) -> Encoder:
        return Encoder(
            self.tokenizer,
            self.options.system,
            self.options.as_chat,
            continues=self.loaded is not None,
            ended_by=self._ended_by(),
            control_tokens=self.options.allow_control_tokens,
        )

    def _ended_by(self) -> int | None:
        """Return how the last answer in the loaded cache ended, as in `next_turn`."""
        history = None if self.loaded is None else self.loaded.history
        if history is None:
            return None
        return history.last[0] if history.last[0] in end_ids(self.model.config, self.tokenizer) else NOT_ENDED

    def encode(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Return the ids of each prompt, and say how control tokens in their text are read."""
        rows = list(map(self.encoder(), prompts))
        self.note_control_tokens(prompts)
        return rows

    def note_control_tokens(self, prompts: Sequence[Prompt]) -> None:
        notices = list(filter(None, map(self.encoder().notice, prompts)))
        if notices:
            more = f" (and {len(notices) - 1} other prompts spell some)" if len(notices) > 1 else ""
            print(f"{one_line(notices[0])}{more}", file=sys.stderr)

    def say_settings(self) -> None:
        """Print which ids end an answer, and the sampling settings that come from the model's own file."""
        origin = origins(self.model, self.tokenizer)
        ids = [
            f"{id_} {self.tokenizer.decode([id_], skip_special_tokens=False)!r} ({origin.get(id_, '--stop')})"
            for id_ in self.config.stop_ids or ()
        ]
        print(f"stop ids: {one_line(', '.join(ids)) or 'none'}", file=sys.stderr)
        if self.defaults:
            values = ", ".join(f"{name} {value:g}" for name, value in self.defaults.items())
            print(f"sampling as in generation_config.json: {values} (--greedy ignores it)", file=sys.stderr)

    def settings(self) -> dict:
        """Return the same for `--json`."""
        sampling = {name: getattr(self.config, name) for name in SAMPLING}
        return {"stop_ids": list(self.config.stop_ids or ()), "sampling": sampling}

    def stream(self) -> TextStream:
        return TextStream(self.tokenizer.decode, self.config.stop_strings)

    def text(self, tokens: np.ndarray) -> str:
        """Return the text of an answer: without the stop id at its end, up to the first stop string."""
        return trim_at_stop(self.tokenizer.decode(self.without_end(tokens)), self.config.stop_strings)

    def write(self, text: str, end: str = "") -> None:
        """Write a piece of an answer to stdout. A terminal would obey control characters, so it gets U+FFFD instead."""
        if sys.stdout.isatty():
            text = "".join(REPLACEMENT if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
        print(text, end=end, flush=True)

    def without_end(self, tokens: np.ndarray) -> np.ndarray:
        """Return the tokens without a stop id at their end."""
        return tokens[:-1] if tokens.size and int(tokens[-1]) in (self.config.stop_ids or ()) else tokens

    def free_context(self, cache: Cache | None) -> int:
        """Return how many more tokens fit into the model's context after those in `cache`."""
        return self.model.config.context_limit()[0] - (0 if cache is None else int(np.max(cache.seen)))

    def start_from_loaded(self, rows: int) -> Cache | None:
        """Return a copy of the loaded cache for each of `rows` prompts; None without --load-cache."""
        return None if self.loaded is None else fork(self.loaded, rows)

    def config_for(
        self, prompt_lengths: Sequence[int], new_tokens: int | None = None, more_to_come: bool = False
    ) -> GenerationConfig:
        """Return the settings, with the capacity that `plan_capacity` chooses for these prompts."""
        config = self.config
        new_tokens = config.max_new_tokens if new_tokens is None else new_tokens
        # Later turns have unknown lengths, so budgets of heads are those for a full context.
        length = self.model.config.context_limit()[0] if more_to_come else max(prompt_lengths) + new_tokens
        policy = policy_for_rows(self.model, config.policy, config.dense, length)
        if uses_pages(self.model.config, self.model.embed.get_value().dtype, config, policy):
            return replace(config, max_length=max(prompt_lengths) + new_tokens, policy=policy, dense=False)
        capacity, overflow = plan_capacity(
            config.capacity, prompt_lengths, new_tokens, policy, config.overflow, more_to_come
        )
        return replace(config, capacity=capacity, overflow=overflow, policy=policy, dense=False)

    def check_lengths(self, rows: Sequence[np.ndarray], where: Sequence[str]) -> None:
        """Refuse a prompt that is too long for the context, before any prompt runs."""
        limit = self.free_context(self.loaded) - self.config.max_new_tokens
        for row, name in zip(rows, where, strict=True):
            if len(row) > limit:
                raise ConfigError(
                    f"{name}: a prompt must have at most {limit} tokens to fit into this model's context with "
                    f"--max-new-tokens {self.config.max_new_tokens}, got {len(row)}; shorten it by {len(row) - limit}"
                )

    def generate(
        self,
        rows: Sequence[np.ndarray],
        config: GenerationConfig,
        cache: Cache | None = None,
        *,
        first: int = 0,
        show: Callable[[list[np.ndarray]], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """Continue `rows`, and count the costs of the prefill and of decoding.

        Row i draws with seed + first + i. `show` is called with the tokens so far, and `cancelled` is asked whether to
        stop. Raises ConfigError, and Cancelled if the user stops the call before the first token.
        """
        seeds = tuple((self.options.seed + first + i) % 2**32 for i in range(len(rows)))
        total, terminal, clock = max(map(len, rows)), sys.stderr.isatty(), self.report.clock

        def watch(progress: Progress) -> bool:
            clock.lap("prefill" if progress.tokens is None else "decode")
            if progress.tokens is None:
                if terminal:
                    _show_prefill(progress.prefilled, total)
                if cancelled():
                    raise Cancelled
            elif show is not None:
                show(progress.tokens)
            clock.start()
            return cancelled()

        clock.start()
        config = replace(config, seed=seeds)
        return generate(self.model, rows, config, tokenizer=self.tokenizer, cache=cache, watch=watch)

    def record(self, result: Generation, index: int, ids: np.ndarray) -> dict:
        """Return the record of one row that `--json` and `--prompts` write."""
        tokens = result.tokens[index]
        return {
            "text": self.text(tokens),
            "finish_reason": result.finish_reasons[index],
            "prompt_tokens": len(ids),
            "new_tokens": len(tokens),
            "tokens": tokens.tolist(),
            "live_pairs": round(float(result.live_pairs[index]), 2),
            "realised_cr": round(float(result.realised_cr[index]), 4),
            "forced_evictions": int(result.forced_evictions[index]),
        }

    def save(self, cache: Cache | None) -> None:
        """Write the cache to the file of --save-cache, if the option is given and a cache exists."""
        if self.options.save_cache and cache is not None:
            dms_jax.save_cache(self.model, cache, self.options.save_cache, overwrite=self.options.overwrite)


def open_session(options: argparse.Namespace) -> Session:
    """Load the model, the tokenizer and the cache that the options of the command name."""
    settings(options, {})  # refuses wrong numbers before anything is read
    defaults = {} if options.greedy else _defaults(options)
    config = settings(options, defaults)
    dtype = jnp.dtype(options.dtype or default_dtype())
    model, tokenizer = open_model(
        options.model,
        options.adapter,
        dtype,
        options.implementation,
        options.allow_non_finite,
        quiet=options.json,  # then stderr holds nothing but the table
    )
    dms = model.config.dms
    if options.threshold is not None and dms is None:
        raise ConfigError(
            f"--threshold must not be given for {options.model}, which has no eviction policy; "
            "give a retrofitted folder, or --adapter FILE"
        )
    special, strings = split_stops(config.stop_strings, tokenizer)
    ends = () if options.ignore_eos else end_ids(model.config, tokenizer)
    config = replace(config, stop_ids=tuple(dict.fromkeys(ends + special)), stop_strings=strings)
    loaded = _load_cache(model, options, config)
    policy = select_policy(model.config, config.policy, config.dense) if loaded is None else loaded.policy
    follows_threshold = policy.is_learned and not policy.has_budget
    if options.policy and options.threshold is not None and not follows_threshold:
        raise ConfigError(
            f"--threshold has no effect with --policy {options.policy}, which has no threshold; leave one of them out"
        )
    jax.block_until_ready(unrolled(model))  # lay out the weights now, so that the first prefill does not count it
    target_cr = model.config.require_dms().target_cr if follows_threshold else None
    if config.temperature == 0:
        defaults = {name: value for name, value in defaults.items() if name not in SAMPLED}
    return Session(options, config, model, tokenizer, loaded, Report(target_cr, Clock(), policy_name(policy)), defaults)


def _defaults(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of generation_config.json for which the user has given no option."""
    folder = resolve(options.model)
    try:
        found = sampling_defaults(folder)
    except ConfigError as why:
        raise ConfigError(f"{why}; mend the file, or give --greedy") from why
    return {name: value for name, value in found.items() if getattr(options, name) is None}


def settings(options: argparse.Namespace, defaults: dict[str, Any]) -> GenerationConfig:
    """Return the settings that the options of the command give, else `defaults`; three of them need a conversion."""
    given = {field.name: getattr(options, field.name) for field in fields(GenerationConfig) if field.name in options}
    return GenerationConfig(
        **{name: value for name, value in given.items() if value is not None or name not in SAMPLING}
        | defaults
        | {
            "stop_strings": tuple(options.stop),
            "capacity": parse_capacity(options.capacity),
            "threshold": 0.0 if options.threshold is None else options.threshold,
        }
    )


def parse_capacity(text: str | None) -> int | tuple[int, ...] | None:
    """Parse --capacity: one number, or one for each layer."""
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ConfigError(
            f"--capacity must be a whole number >= 1, or one for each layer with commas between, got {text!r}"
        )
    return numbers if len(numbers) > 1 else numbers[0]


def _load_cache(model: Decoder, options: argparse.Namespace, config: GenerationConfig) -> Cache | None:
    if not options.load_cache:
        return None
    cache = dms_jax.load_cache(model, options.load_cache)
    if cache.batch_size != 1:
        raise ConfigError(
            f"--load-cache must name a cache of one row, got {cache.batch_size} rows in {options.load_cache}; "
            "use dms_jax.load_cache in Python"
        )
    if int(cache.seen[0]) == 0:
        raise ConfigError(f"--load-cache must name a cache with tokens, got an empty one in {options.load_cache}")
    if cache.history is None and config.repetition_penalty != 1:
        raise ConfigError(
            f"{options.load_cache} does not say which tokens its cache has seen, as files of an earlier version, so a "
            "repetition penalty cannot count them; give --repetition-penalty 1, or save the cache again"
        )
    if options.overflow == "evict" and isinstance(cache, PagedCache):
        raise ConfigError(
            f"--overflow must be grow or raise for the cache in {options.load_cache}, which is in pages; leave it out"
        )
    return replace(cache, overflow=options.overflow).with_history(cache.history) if options.overflow else cache


def non_finite(names: Sequence[str]) -> str:
    """Return the message about answers that ended because the model gave no usable logits."""
    return (
        f"{shorten(list(names))}: the model's logits are not finite (NaN or infinity), so no further token can be "
        "chosen; check the weights, or give --dtype float32"
    )


def _show_prefill(done: int, total: int) -> None:
    """Show the progress on one line of the terminal, and clear the line at the end."""
    line = f"\rreading {done} of {total} tokens" if done < total else "\r\033[K"
    print(line, end="", file=sys.stderr, flush=True)
