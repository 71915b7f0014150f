"""Seconds of prefill and decoding, with the time for compilation counted separately."""

import time

import jax


class Clock:
    """Seconds of each phase; tracing and compilation form a separate phase, "compile".

    The device must be idle when a lap ends, as it is when `generate` calls its `watch`. Otherwise, some of the work of
    one lap is counted in the next.
    """

    def __init__(self):
        self.seconds = {"prefill": 0.0, "decode": 0.0, "compile": 0.0}
        self.compiled: list[tuple[float, float]] = []  # begin and end of each compilation since the last lap
        self.begun = self.since = time.perf_counter()
        self.to_first_token: float | None = None  # seconds from the making of the clock, compilation included
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self.compiled.append((now - duration_secs, now))

    def start(self) -> None:
        """Begin a lap now; the time since the end of the last lap is not counted."""
        self.since, self.compiled = time.perf_counter(), []

    def lap(self, phase: str) -> None:
        """Add the time since the last start or lap to a phase."""
        now = time.perf_counter()
        compiling = covered(self.compiled, self.since)
        self.seconds[phase] += max(0.0, now - self.since - compiling)
        self.seconds["compile"] += compiling
        if phase == "decode" and self.to_first_token is None:
            self.to_first_token = now - self.begun
        self.start()

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)


def covered(intervals: list[tuple[float, float]], since: float) -> float:
    """Return the length of the union of intervals, from `since` on.

    Intervals overlap, because tracing a function traces the functions inside it, and JAX reports both.
    """
    total, until = 0.0, since
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
