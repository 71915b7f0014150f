"""What a generation cost: time without compiling, and memory next to that of a dense cache."""

import time
from dataclasses import dataclass, field

import numpy as np


class Clock:
    """Seconds of prefill and decode; what went into tracing and compiling is counted apart.

    The device must be idle when a lap ends, as it is when `generate` calls its `watch`: else work of one lap is hidden in the next.
    """

    def __init__(self):
        import jax

        self.seconds = {"prefill": 0.0, "decode": 0.0, "compile": 0.0}
        self.compiled: list[tuple[float, float]] = []
        self.since = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self.compiled.append((now - duration_secs, now))

    def start(self) -> None:
        self.since, self.compiled = time.perf_counter(), []

    def lap(self, phase: str) -> None:
        """Book the time since the last start or lap."""
        now = time.perf_counter()
        compiling = covered(self.compiled, self.since)
        self.seconds[phase] += max(0.0, now - self.since - compiling)
        self.seconds["compile"] += compiling
        self.start()

    def close(self) -> None:
        import jax

        jax.monitoring.unregister_event_duration_listener(self._heard)


def covered(intervals: list[tuple[float, float]], since: float) -> float:
    """Length of the union of intervals, from `since` on: tracing a function traces those inside it, and both are reported."""
    total, until = 0.0, since
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


@dataclass
class Report:
    """Sums over all prompts or turns of a command."""

    nominal_cr: float | None  # None: no policy, or not used
    clock: Clock
    prompts: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    caches: list[dict] = field(default_factory=list)  # of each batch; of a conversation, the one it has now

    def add(self, prompt_tokens: int, new_tokens: int, cache, rows: int, goes_on: bool = False) -> None:
        self.prompts += rows
        self.prefill_tokens += prompt_tokens
        self.decode_tokens += new_tokens
        self.caches = [*([] if goes_on else self.caches), cache_numbers(cache, rows)]

    def numbers(self) -> dict:
        """Everything in the table, for `--json`."""
        seconds = {f"{phase}_s": round(value, 4) for phase, value in self.clock.seconds.items()}
        rate = lambda tokens, phase: (
            round(tokens / self.clock.seconds[phase], 2) if self.clock.seconds[phase] > 0 else None
        )
        sums = {key: sum(cache[key] for cache in self.caches) for key in ("seen", "rows", "live", "forced_evictions")}
        most = {
            key: max((cache[key] for cache in self.caches), default=0)
            for key in ("cache_bytes", "live_bytes", "dense_bytes")
        }
        return {
            "prompts": self.prompts,
            "prefill_tokens": self.prefill_tokens,
            "decode_tokens": self.decode_tokens,
            **seconds,
            "prefill_tokens_per_s": rate(self.prefill_tokens, "prefill"),
            "decode_tokens_per_s": rate(self.decode_tokens, "decode"),
            "realised_cr": round(sums["seen"] / sums["live"], 4) if sums["live"] else 1.0,
            "nominal_cr": self.nominal_cr,
            "tokens_seen_per_row": round(sums["seen"] / max(sums["rows"], 1), 1),
            "live_pairs_per_head": round(sums["live"] / max(sums["rows"], 1), 1),
            **most,
            "forced_evictions": sums["forced_evictions"],
        }

    def table(self) -> str:
        n = self.numbers()
        show = lambda value, width, digits: f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"
        lines = [f"{'':<10}{'tokens':>9}{'seconds':>10}{'tokens/s':>10}"]
        for phase in ("prefill", "decode"):
            lines.append(
                f"{phase:<10}{n[f'{phase}_tokens']:>9}{show(n[f'{phase}_s'], 10, 2)}{show(n[f'{phase}_tokens_per_s'], 10, 1)}"
            )
        lines.append(f"{'compile':<10}{'':>9}{show(n['compile_s'], 10, 2)}")
        nominal = "dense" if n["nominal_cr"] is None else f"nominal {n['nominal_cr']:g}"
        lines.append(
            f"live {n['live_pairs_per_head']:g} of {n['tokens_seen_per_row']:g} tokens a row and head: CR {n['realised_cr']:.2f} ({nominal})"
        )
        size = lambda count: f"{count / 2**20:.1f} MiB"
        lines.append(
            f"cache {size(n['cache_bytes'])} allocated, {size(n['live_bytes'])} live, {size(n['dense_bytes'])} if dense; "
            f"forced evictions {n['forced_evictions']}"
        )
        return "\n".join(lines)


def cache_numbers(cache, rows: int) -> dict:
    """Tokens and live pairs of the first `rows` rows, live pairs as a mean over layers and heads; bytes of keys and values, and
    of what is allocated for them with all book-keeping."""
    seen, live = np.asarray(cache.seen, np.float64)[:rows], np.asarray(cache.live_counts, np.float64)[:, :rows]
    layer = cache.layers[0]
    pair = 2 * layer.k.shape[3] * layer.k.dtype.itemsize
    return {
        "rows": rows,
        "seen": float(seen.sum()),
        "live": float(live.mean(axis=(0, 2)).sum()) if live.size else 0.0,
        "forced_evictions": int(np.asarray(cache.forced_evictions)[:, :rows].sum()),
        "cache_bytes": cache.bytes,
        "live_bytes": int(live.sum()) * pair,
        "dense_bytes": int(seen.sum()) * len(cache.layers) * layer.k.shape[1] * pair,
    }
