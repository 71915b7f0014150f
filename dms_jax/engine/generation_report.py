"""Costs of one `generate` command: tokens per second without compilation, and memory compared to a dense cache."""

from dataclasses import dataclass, field

import numpy as np

from dms_jax.core.cache_base import Cache
from dms_jax.engine.stopwatch import Clock


@dataclass
class Report:
    """Sums over all prompts or turns of a command."""

    target_cr: float | None  # of training; None unless the command follows the evict head at a threshold
    clock: Clock
    policy: str = "dense"  # its name
    prompts: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    caches: list[dict] = field(default_factory=list)  # `cache_numbers` of each batch, or of a conversation as it is now

    def add(self, prompt_tokens: int, new_tokens: int, cache: Cache, rows: int, same_cache: bool = False) -> None:
        """Count a batch; the first `rows` rows of `cache` are its prompts, and the others are padding.

        With `same_cache`, the cache replaces the last one that was counted, as in the next turn of a conversation.
        """
        self.prompts += rows
        self.prefill_tokens += prompt_tokens
        self.decode_tokens += new_tokens
        self.caches = [*([] if same_cache else self.caches), cache_numbers(cache, rows)]

    def numbers(self) -> dict:
        """Return all figures of the table, for `--json`."""
        seconds = self.clock.seconds
        sums = {
            key: sum(cache[key] for cache in self.caches)
            for key in ("seen", "rows", "live", "staying", "forced_evictions")
        }
        largest = {
            key: max((cache[key] for cache in self.caches), default=0)
            for key in ("allocated_bytes", "live_bytes", "dense_bytes")
        }
        return {
            "prompts": self.prompts,
            "prefill_tokens": self.prefill_tokens,
            "decode_tokens": self.decode_tokens,
            **{f"{phase}_s": round(value, 4) for phase, value in seconds.items()},
            "seconds_to_first_token": self.clock.to_first_token and round(self.clock.to_first_token, 4),
            "prefill_tokens_per_s": _rate(self.prefill_tokens, seconds["prefill"]),
            "decode_tokens_per_s": _rate(self.decode_tokens, seconds["decode"]),
            "realised_cr": _ratio(sums["seen"], sums["live"]) or 1.0,
            "nominal_cr": None if self.target_cr is None else _ratio(sums["seen"], sums["staying"]),
            "target_cr": self.target_cr,
            "tokens_seen_per_row": round(sums["seen"] / max(sums["rows"], 1), 1),
            "live_pairs_per_head": round(sums["live"] / max(sums["rows"], 1), 1),
            **largest,
            "cache_bytes": largest["allocated_bytes"],
            "forced_evictions": sums["forced_evictions"],
        }

    def table(self) -> str:
        """Return the table that the command prints at its end."""
        n = self.numbers()
        lines = [f"{'':<10}{'tokens':>9}{'seconds':>10}{'tokens/s':>10}"]
        for phase in ("prefill", "decode"):
            rate = n[f"{phase}_tokens_per_s"]
            rate = "-" if rate is None else f"{rate:.1f}"
            lines.append(f"{phase:<10}{n[f'{phase}_tokens']:>9}{n[f'{phase}_s']:>10.2f}{rate:>10}")
        lines.append(f"{'compile':<10}{'':>9}{n['compile_s']:>10.2f}")
        if n["seconds_to_first_token"] is not None:
            lines.append(f"seconds to the first token, compiling included: {n['seconds_to_first_token']:.2f}")
        nominal = "-" if n["nominal_cr"] is None else f"{n['nominal_cr']:.2f}"
        policy = self.policy if self.target_cr is None else f"nominal {nominal}, target {self.target_cr:g}"
        lines.append(
            f"live pairs per row and head: {n['live_pairs_per_head']:g} for {n['tokens_seen_per_row']:g} tokens, "
            f"CR {n['realised_cr']:.2f} ({policy})"
        )
        lines.append(
            f"cache: {_mebibytes(n['allocated_bytes'])} allocated, {_mebibytes(n['live_bytes'])} live, "
            f"{_mebibytes(n['dense_bytes'])} if dense; forced evictions {n['forced_evictions']}"
        )
        return "\n".join(lines)


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 2) if seconds > 0 else None


def _ratio(seen: float, pairs: float) -> float | None:
    return round(seen / pairs, 4) if pairs else None


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def cache_numbers(cache: Cache, rows: int) -> dict:
    """Return sums over the first `rows` rows: tokens seen, live pairs (mean over layers and heads), and bytes.

    `staying` counts the pairs that no decision evicts, which give the nominal CR.
    `live_bytes` and `dense_bytes` are keys and values only, `dense_bytes` those of a dense cache. `allocated_bytes` is
    all memory of the cache, including the bookkeeping.
    """
    seen, live = np.asarray(cache.seen, np.float64)[:rows], np.asarray(cache.live_counts, np.float64)[:, :rows]
    staying = np.asarray(cache.staying_counts)[:, :rows]
    return {
        "rows": rows,
        "seen": float(seen.sum()),
        "live": float(live.mean(axis=(0, 2)).sum()) if live.size else 0.0,
        "staying": float(staying.mean(axis=(0, 2)).sum()) if staying.size else 0.0,
        "forced_evictions": int(np.asarray(cache.forced_evictions)[:, :rows].sum()),
        "allocated_bytes": int(cache.bytes),
        "live_bytes": int(live.sum()) * cache.pair_bytes,
        "dense_bytes": int(seen.sum()) * live.shape[0] * live.shape[2] * cache.pair_bytes,
    }
