"""What the modes of `infer.generate` share: the model, its settings, the clock, and one call of `dms_jax.generate`."""

import argparse
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import dms_jax
from dms_jax.engine.cache_capacity import context_limit, round_up
from dms_jax.engine.decode_layout import unrolled
from dms_jax.engine.generation import Progress
from dms_jax.engine.generation_config import find_stop
from dms_jax.engine.generation_report import Clock, Report
from dms_jax.engine.prompts import Encoder
from dms_jax.engine.text_stream import TextStream
from dms_jax.errors import ConfigError
from dms_jax.policies import KeepAll


class Cancelled(Exception):
    """Somebody stopped the prefill; no cache has changed."""


class Engine:
    """The model of one command and the costs so far."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        settings = self._settings()  # wrong numbers are refused before the weights are read
        dtype = jnp.dtype(options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
        self.tokenizer = dms_jax.load_tokenizer(options.model)
        self.model = dms_jax.load(options.model, dtype=dtype, implementation=options.implementation)
        if options.adapter:
            self.model = dms_jax.load_adapter(self.model, options.adapter)
        dms = self.model.config.dms
        if options.threshold is not None and dms is None:
            raise ConfigError(
                f"--threshold has no use: {options.model} has no eviction policy; give a retrofitted folder, or --adapter FILE"
            )
        self.stop_ids = () if options.ignore_eos else self.model.config.eos_token_ids
        self.config = replace(settings, stop_ids=self.stop_ids)
        self.loaded = self._load_cache() if options.load_cache else None
        dense = self.loaded.policy == KeepAll() if self.loaded is not None else options.dense
        jax.block_until_ready(unrolled(self.model))  # lays out the weights: part of loading, not of the first prefill
        self.report = Report(None if dms is None or dense else dms.target_cr, Clock())

    def _settings(self) -> "dms_jax.GenerationConfig":
        o = self.options
        grows = o.capacity is None and (o.chat or o.save_cache)  # more will come than this call knows of
        return dms_jax.GenerationConfig(
            max_new_tokens=o.max_new_tokens,
            temperature=o.temperature,
            top_k=o.top_k,
            top_p=o.top_p,
            min_p=o.min_p,
            repetition_penalty=o.repetition_penalty,
            stop_strings=tuple(o.stop),
            seed=o.seed,
            capacity=parse_capacity(o.capacity),
            overflow=o.overflow or ("grow" if grows else None),
            chunk_size=o.chunk_size,
            threshold=o.threshold or 0.0,
            dense=o.dense,
        )

    def _load_cache(self):
        cache = dms_jax.load_cache(self.model, self.options.load_cache)
        if cache.batch_size != 1:
            raise ConfigError(
                f"{self.options.load_cache} holds {cache.batch_size} rows, this command goes on from one; use dms_jax.load_cache in Python"
            )
        if int(cache.seen[0]) == 0:
            raise ConfigError(f"{self.options.load_cache} holds an empty cache; leave --load-cache out")
        return replace(cache, overflow=self.options.overflow) if self.options.overflow else cache

    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.options.system, self.options.as_chat, continues=self.loaded is not None)

    def stream(self) -> TextStream:
        return TextStream(self.tokenizer.decode, self.options.stop)

    def shown(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens without the end-of-text that closes them."""
        return tokens[:-1] if tokens.size and int(tokens[-1]) in self.stop_ids else tokens

    def room(self, cache) -> int:
        """Tokens that the model's context still takes."""
        return context_limit(self.model.config)[0] - (0 if cache is None else int(np.max(cache.seen)))

    def refuse_too_long(self, ids: list[np.ndarray], where: list[str]) -> None:
        """Before the first prompt runs: name the first one that cannot."""
        room = self.room(self.loaded) - self.config.max_new_tokens
        for row, name in zip(ids, where, strict=True):
            if len(row) > room:
                raise ConfigError(
                    f"{name}: {len(row)} tokens are {len(row) - room} too many for this model's context together with "
                    f"--max-new-tokens {self.config.max_new_tokens}"
                )
        if (
            self.config.capacity is None and self.config.overflow != "grow"
        ):  # one capacity for all: another one is compiled anew
            self.config = replace(self.config, capacity=round_up(max(map(len, ids)) + self.config.max_new_tokens))

    def generate(
        self,
        rows: list[np.ndarray],
        cache=None,
        first: int = 0,
        show=None,
        cancelled=lambda: False,
        max_new_tokens: int | None = None,
    ):
        """Continue `rows`; row i draws with seed + first + i. `show` gets the tokens so far, `cancelled` is asked when to stop.

        Raises ConfigError; Cancelled when that happens before the first token.
        """
        seeds = tuple((self.options.seed + first + i) % 2**32 for i in range(len(rows)))
        config = replace(self.config, seed=seeds, max_new_tokens=max_new_tokens or self.config.max_new_tokens)
        if cache is None and self.loaded is not None:
            cache = dms_jax.fork(self.loaded, len(rows))
        elif cache is None and self.options.save_cache and config.capacity is None:
            config = replace(
                config, capacity=round_up(len(rows[0]) + config.max_new_tokens)
            )  # enough at once, and free to grow later
        total, live, clock = max(map(len, rows)), sys.stderr.isatty(), self.report.clock

        def watch(progress: Progress) -> bool:
            clock.lap("prefill" if progress.tokens is None else "decode")
            if progress.tokens is None:
                if live and total > progress.prefilled:
                    print(f"\rreading {progress.prefilled} of {total} tokens", end="", file=sys.stderr, flush=True)
                elif live:
                    print("\r\033[K", end="", file=sys.stderr, flush=True)
                if cancelled():
                    raise Cancelled
            elif show is not None:
                show(progress.tokens)
            clock.start()
            return cancelled()

        clock.start()
        return dms_jax.generate(self.model, rows, config, tokenizer=self.tokenizer, cache=cache, watch=watch)

    def row(self, result, index: int, ids: np.ndarray) -> dict:
        """What there is to say about one row."""
        tokens = self.shown(result.tokens[index])
        text = self.tokenizer.decode(tokens)
        return {
            "text": text[: find_stop(text, self.options.stop)],
            "finish_reason": result.finish_reasons[index],
            "prompt_tokens": len(ids),
            "new_tokens": len(result.tokens[index]),
            "tokens": result.tokens[index].tolist(),
            "live_pairs": round(float(result.live_pairs[index]), 2),
            "realised_cr": round(float(result.realised_cr[index]), 4),
            "forced_evictions": int(result.forced_evictions[index]),
        }

    def save(self, cache) -> None:
        if self.options.save_cache and cache is not None:
            dms_jax.save_cache(self.model, cache, self.options.save_cache, overwrite=self.options.overwrite)


def parse_capacity(text: str | None) -> int | tuple[int, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--capacity wants a whole number, or one per layer with commas between; got {text!r}"
        ) from None
    if bad := [n for n in numbers if n < 1]:
        raise ConfigError(f"--capacity must be at least 1, got {bad[0]}")
    return numbers if len(numbers) > 1 else numbers[0]
