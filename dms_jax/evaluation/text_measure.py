"""The tasks on given text: "text" (KL and perplexity against the dense model), "greedy" (free-running, against the dense model's
own continuation) and "kept" (what of a row is still held at its end)."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

import dms_jax
from dms_jax.core.compact_cache import compression_ratio, nominal_compression_ratio
from dms_jax.engine.generation import Generation
from dms_jax.errors import ConfigError
from dms_jax.evaluation.arms import LEARNED, TRAINED, Arm, Setting, Settings
from dms_jax.evaluation.results import ResultsFile, rounded
from dms_jax.evaluation.teacher_forced import dense_hidden, online_rows


@dataclass(frozen=True)
class Domain:
    """Rows [rows, length] to measure on, and rows of the same text, after them, on which thresholds are calibrated."""

    name: str
    rows: np.ndarray
    calibration: np.ndarray


def cut_domain(name: str, ids: np.ndarray, begin: np.ndarray, length: int, rows: int, calibration_rows: int) -> Domain:
    """Rows of a stream of tokens, each with `begin` (bos, where the model expects it) in front. Raises ConfigError when there are
    too few."""
    wanted, take = rows + calibration_rows, length - len(begin)
    if len(ids) < wanted * take:
        count, shorter = max(0, len(ids) // take - calibration_rows), len(ids) // (1 + calibration_rows) // 16 * 16
        way_out = (
            f"use --rows {count}"
            if count
            else f"use --length {shorter} --rows 1"
            if shorter
            else "use a smaller --chunk and --length"
        )
        why = (
            f"{rows} rows of {length} and {calibration_rows} to calibrate on"
            if calibration_rows
            else f"{rows} rows of {length}"
        )
        raise ConfigError(
            f"the text {name} has {len(ids)} tokens, {why} take {wanted * take}; {way_out}, or give more text"
        )
    cut = ids[: wanted * take].reshape(wanted, take).astype(np.int32)
    cut = np.concatenate([np.repeat(begin[None].astype(np.int32), wanted, axis=0), cut], axis=1)
    return Domain(name, cut[:rows], cut[rows:])


class TextMeasure:
    """Runs arms over domains, batch by batch, and writes a line a row."""

    def __init__(self, model, domains: list[Domain], settings: Settings, file: ResultsFile, batch: int, chunk: int):
        self.model, self.domains, self.settings, self.file, self.chunk = model, domains, settings, file, chunk
        self.batch = min(batch, max((len(domain.rows) for domain in domains), default=1))
        self._dense: dict[tuple[str, int], np.ndarray] = {}
        self._dense_continued: dict[tuple[str, int], list[np.ndarray]] = {}

    def run(self, arm: Arm, done) -> None:
        """Task "text" of one arm; `done` is called after each row."""
        for domain in self.domains:
            for start, names in self._batches(domain):
                missing = self._missing("text", arm, names)
                if missing:
                    for name, record in zip(names, self._rows(arm, domain, start), strict=True):
                        if name in missing:
                            self.file.append(
                                {"task": "text", "policy": arm.policy, "budget": arm.budget, "unit": name, **record}
                            )
                done(len(names))

    def _batches(self, domain: Domain) -> Iterator[tuple[int, list[str]]]:
        """Where each batch begins, and the names of its rows."""
        for start in range(0, len(domain.rows), self.batch):
            yield start, [f"{domain.name}/{i}" for i in range(start, min(start + self.batch, len(domain.rows)))]

    def _missing(self, task: str, arm: Arm, names: list[str]) -> list[str]:
        return [name for name in names if (task, arm.policy, arm.budget, name) not in self.file.done]

    def setting(self, arm: Arm, domain: Domain) -> Setting:
        def held() -> float | None:
            trained = [r["live_tokens"] for r in self.file.of("text", "dms", TRAINED) if r["domain"] == domain.name]
            return float(np.mean(trained)) if trained and arm.budget == TRAINED else None

        return self.settings.of(arm, domain.rows.shape[1], domain.name, lambda: domain.calibration, held)

    def _rows(self, arm: Arm, domain: Domain, start: int) -> list[dict]:
        rows, filled = domain.rows[start : start + self.batch], self._filled(domain, start)
        if (domain.name, start) not in self._dense:
            self._dense[domain.name, start] = np.asarray(dense_hidden(self.model, filled))
        setting = self.setting(arm, domain)
        out = online_rows(
            self.model, self._dense[domain.name, start], filled, setting.policy, setting.threshold, self.chunk
        )
        live = np.asarray(out.cache.live_counts, np.float64).mean(axis=(0, 2))
        length = rows.shape[1]
        records = []
        for b in range(len(rows)):
            row = jax.tree.map(lambda x, b=b: x[b : b + 1], out.cache)
            records.append(
                {
                    "domain": domain.name,
                    "length": length,
                    "live_tokens": float(live[b]),
                    "mean_live_tokens": float(out.live_by_chunk[b].mean()),
                    "pairs_read": float(setting.policy.pairs_read(live[b])),
                    "realised_cr": compression_ratio(row),
                    "nominal_cr": nominal_compression_ratio(row) if arm.policy in LEARNED else compression_ratio(row),
                    "threshold": setting.threshold,
                    "agree": float(out.tokens.agree[b, :-1].mean()),
                    "kl": rounded(out.tokens.kl_teacher_student[b, :-1]),
                    "nll": rounded(out.tokens.student_nll[b, :-1]),
                }
            )
        return records

    def greedy(self, arm: Arm, new_tokens: int, done) -> None:
        """Task "greedy": rows cut `new_tokens` before their end are continued by the dense model and by the arm."""
        for domain in self.domains:
            for start, names in self._batches(domain):
                if missing := self._missing("greedy", arm, names):
                    rows = self._filled(domain, start)[:, :-new_tokens]
                    if (domain.name, start) not in self._dense_continued:
                        self._dense_continued[domain.name, start] = self._continued(
                            rows, new_tokens, self.settings.dense()
                        ).tokens
                    out, dense = (
                        self._continued(rows, new_tokens, self.setting(arm, domain)),
                        self._dense_continued[domain.name, start],
                    )
                    for b, name in enumerate(names):
                        if name in missing:
                            same = dense[b] == out.tokens[b]
                            self.file.append(
                                {
                                    "task": "greedy",
                                    "policy": arm.policy,
                                    "budget": arm.budget,
                                    "unit": name,
                                    "domain": domain.name,
                                    "tokens": new_tokens,
                                    "match": float(same.mean()),
                                    "divergence": new_tokens if same.all() else int(np.argmin(same)),
                                    "live_tokens": float(out.live_pairs[b]),
                                    "realised_cr": float(out.realised_cr[b]),
                                }
                            )
                done(len(names))

    def _filled(self, domain: Domain, start: int) -> np.ndarray:
        """A batch of rows, the last one over and over where the text has no more: one shape, one program."""
        rows = domain.rows[start : start + self.batch]
        return np.concatenate([rows, np.repeat(rows[-1:], self.batch - len(rows), axis=0)])

    def _continued(self, rows: np.ndarray, new_tokens: int, setting: Setting) -> Generation:
        length = rows.shape[1] + new_tokens
        most = setting.policy.slot_bounds().max
        config = dms_jax.GenerationConfig(
            max_new_tokens=new_tokens,
            stop_ids=(),
            policy=setting.policy,
            threshold=setting.threshold,
            chunk_size=None if most is None else self.chunk,
            capacity=min(most or length, length),
        )
        return dms_jax.generate(self.model, rows, config)

    def kept(self, arm: Arm, tokenizer) -> None:
        """Task "kept" of a learned arm: the first row of each domain."""
        from dms_jax.models.decoder import with_window

        for domain in self.domains:
            key = "kept", arm.policy, arm.budget, f"{domain.name}/0"
            if arm.policy not in LEARNED or key in self.file.done:
                continue
            setting, tokens = self.setting(arm, domain), domain.rows[:1]
            window = setting.policy.window_size
            dms = self.model.config.require_dms()
            _, evict = with_window(self.model, window).hard_hidden(tokens, None, setting.threshold)
            held = held_by_position(np.asarray(evict)[:, 0], window, dms.decision_shift)
            self.file.append(
                {
                    **dict(zip(("task", "policy", "budget", "unit"), key, strict=True)),
                    "domain": domain.name,
                    "length": tokens.shape[1],
                    "pieces": [tokenizer.decode(tokens[0, t : t + 1]) for t in range(tokens.shape[1])],
                    "kept": rounded(held.kept),
                    "live_per_head": held.live_per_head.tolist(),
                    "live_by_position": rounded(held.live_by_position),
                    "window_size": window,
                    "realised_cr": float(tokens.shape[1] / held.live_by_position[-1]),
                }
            )


@dataclass(frozen=True)
class Held:
    kept: np.ndarray  # [T] fraction of layers and heads that hold each token's pair at the end
    live_per_head: np.ndarray  # int [L K] at the end
    live_by_position: np.ndarray  # [T] mean pairs held after each token


def held_by_position(evict: np.ndarray, window_size: int, shift: int) -> Held:
    """From the decisions [L K T] of one row: token t's own decision marks pair t - `shift`."""
    length = evict.shape[-1]
    marked = np.zeros_like(evict)
    marked[..., : length - shift] = evict[..., shift:]
    gone_at = np.arange(length) + window_size + 1  # a marked pair is held before this position
    gone = np.zeros(evict.shape, np.int64)
    in_row = gone_at < length
    gone[..., gone_at[in_row]] = marked[..., in_row]
    live = np.arange(1, length + 1) - np.cumsum(gone, axis=-1)
    there = ~(marked & in_row)
    return Held(there.mean(axis=(0, 1)), live[..., -1], live.mean(axis=(0, 1)))
