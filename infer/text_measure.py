"""The tasks on given text: "text" (KL and perplexity against the dense model), "greedy" (free-running, against the dense model's
own continuation) and "kept" (what of a row is still held at its end)."""

from dataclasses import dataclass

import jax
import numpy as np

import dms_jax
from dms_jax.config import ConfigError
from dms_jax.core.compact_cache import compression_ratio, nominal_compression_ratio
from dms_jax.online_evaluation import dense_hidden, online_rows
from infer.arms import LEARNED, PROMPT, TRAINED, Arm, Setting, Settings
from infer.results import ResultsFile, rounded


@dataclass(frozen=True)
class Domain:
    """Rows [rows, length] to measure on, and rows of the same text, after them, on which thresholds are calibrated."""

    name: str
    rows: np.ndarray
    calibration: np.ndarray


def cut_domain(name: str, ids: np.ndarray, length: int, rows: int, calibration_rows: int) -> Domain:
    """Rows of a stream of tokens. Raises ConfigError when there are too few."""
    wanted = rows + calibration_rows
    if len(ids) < wanted * length:
        count = max(0, len(ids) // length - calibration_rows)
        way_out = f"use --rows {count}" if count else f"use --length {max(16, len(ids) // (1 + calibration_rows) // 16 * 16)} --rows 1"
        why = f"{rows} rows of {length} and {calibration_rows} to calibrate on" if calibration_rows else f"{rows} rows of {length}"
        raise ConfigError(f"the text {name} has {len(ids)} tokens, {why} take {wanted * length}; {way_out}, or give more text")
    cut = ids[: wanted * length].reshape(wanted, length).astype(np.int32)
    return Domain(name, cut[:rows], cut[rows:])


class TextMeasure:
    """Runs arms over domains, batch by batch, and writes a line a row."""

    def __init__(self, model, domains: list[Domain], settings: Settings, file: ResultsFile, batch: int, chunk: int):
        self.model, self.domains, self.settings, self.file, self.batch, self.chunk = model, domains, settings, file, batch, chunk
        self._dense: dict[tuple[str, int], np.ndarray] = {}

    def run(self, arm: Arm, done) -> None:
        """Task "text" of one arm; `done` is called after each row."""
        if arm.policy.startswith(PROMPT):
            raise ConfigError(f"--policies {arm.policy}: prompt compression ranks once, after a prompt; it does not apply to --tasks text")
        for domain in self.domains:
            for start in range(0, len(domain.rows), self.batch):
                names = [f"{domain.name}/{i}" for i in range(start, min(start + self.batch, len(domain.rows)))]
                missing = [name for name in names if ("text", arm.policy, arm.budget, name) not in self.file.done]
                if missing:
                    for name, record in zip(names, self._rows(arm, domain, start), strict=True):
                        if name in missing:
                            self.file.append({"task": "text", "policy": arm.policy, "budget": arm.budget, "unit": name, **record})
                done(len(names))

    def setting(self, arm: Arm, domain: Domain) -> Setting:
        def held() -> float:
            trained = [r for r in self.file.records if (r["task"], r["policy"], r["budget"]) == ("text", "dms", TRAINED)]
            if not trained:
                raise ConfigError(f"{arm} needs to know what dms held; put text into --tasks, before the others")
            return float(np.mean([record["live_tokens"] for record in trained]))

        return self.settings.of(arm, domain.rows.shape[1], domain.name, lambda: domain.calibration, held)

    def _rows(self, arm: Arm, domain: Domain, start: int) -> list[dict]:
        rows = domain.rows[start : start + self.batch]
        filled = np.concatenate([rows, np.repeat(rows[-1:], self.batch - len(rows), axis=0)])  # one shape, one program
        if (domain.name, start) not in self._dense:
            self._dense[domain.name, start] = np.asarray(dense_hidden(self.model, filled))
        setting = self.setting(arm, domain)
        out = online_rows(self.model, self._dense[domain.name, start], filled, setting.policy, setting.threshold, self.chunk)
        live = np.asarray(out.cache.live_counts, np.float64).mean(axis=(0, 2))
        length = rows.shape[1]
        records = []
        for b in range(len(rows)):
            row = jax.tree.map(lambda x, b=b: x[b : b + 1], out.cache)
            records.append({
                "domain": domain.name, "length": length, "live_tokens": float(live[b]), "mean_live_tokens": float(out.live_by_chunk[b].mean()),
                "pairs_read": float(setting.policy.pairs_read(live[b])), "realised_cr": compression_ratio(row),
                "nominal_cr": nominal_compression_ratio(row) if arm.policy in LEARNED else compression_ratio(row), "threshold": setting.threshold,
                "agree": float(out.tokens.agree[b, :-1].mean()), "kl": rounded(out.tokens.kl_teacher_student[b, :-1]),
                "nll": rounded(out.tokens.student_nll[b, :-1]),
            })  # fmt: skip
        return records

    def greedy(self, arm: Arm, new_tokens: int, done) -> None:
        """Task "greedy": rows cut `new_tokens` before their end are continued by the dense model and by the arm."""
        for domain in self.domains:
            prompts = domain.rows[:, : domain.rows.shape[1] - new_tokens]
            for start in range(0, len(prompts), self.batch):
                names = [f"{domain.name}/{i}" for i in range(start, min(start + self.batch, len(prompts)))]
                if all(("greedy", arm.policy, arm.budget, name) in self.file.done for name in names):
                    done(len(names))
                    continue
                setting = self.setting(arm, domain) if arm.policy != "dense" else None
                dense = self._continued(prompts[start : start + self.batch], new_tokens, "dense", 0.0)
                out = (
                    dense if setting is None else self._continued(prompts[start : start + self.batch], new_tokens, setting.policy, setting.threshold)
                )
                for b, name in enumerate(names):
                    same = dense.tokens[b] == out.tokens[b]
                    self.file.append({
                        "task": "greedy", "policy": arm.policy, "budget": arm.budget, "unit": name, "domain": domain.name, "tokens": new_tokens,
                        "match": float(same.mean()), "divergence": new_tokens if same.all() else int(np.argmin(same)),
                        "live_tokens": float(out.live_pairs[b]), "realised_cr": float(out.realised_cr[b]),
                    })  # fmt: skip
                done(len(names))

    def _continued(self, prompts, new_tokens, policy, threshold):
        config = dms_jax.GenerationConfig(
            max_new_tokens=new_tokens, stop_ids=(), policy=policy, threshold=threshold, chunk_size=self.chunk, capacity=self._capacity(policy)
        )
        return dms_jax.generate(self.model, prompts, config)

    def _capacity(self, policy) -> int | None:
        length = self.domains[0].rows.shape[1]
        return None if isinstance(policy, str) else min(policy.room().most or length, length)

    def kept(self, arm: Arm, tokenizer) -> None:
        """Task "kept" of a learned arm: the first row of each domain."""
        from dms_jax.models.decoder import with_window

        for domain in self.domains:
            key = "kept", arm.policy, arm.budget, f"{domain.name}/0"
            if arm.policy not in LEARNED or key in self.file.done:
                continue
            setting, tokens = self.setting(arm, domain), domain.rows[:1]
            window = setting.policy.window_size
            dms = self.model.config.policy
            _, evict = with_window(self.model, window).hard_hidden(tokens, None, setting.threshold)
            held = held_by_position(np.asarray(evict)[:, 0], window, dms.decision_shift)
            self.file.append({
                **dict(zip(("task", "policy", "budget", "unit"), key, strict=True)), "domain": domain.name, "length": tokens.shape[1],
                "pieces": [tokenizer.decode(tokens[0, t : t + 1]) for t in range(tokens.shape[1])], "kept": rounded(held.kept),
                "live_per_head": held.live_per_head.tolist(), "live_by_position": rounded(held.live_by_position), "window_size": window,
                "realised_cr": float(tokens.shape[1] / held.live_by_position[-1]),
            })  # fmt: skip


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
