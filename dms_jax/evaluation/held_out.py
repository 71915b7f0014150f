"""Measure how far a retrofitted model is from its dense base on held-out rows, by a threshold and within exact budgets,
and how far StreamingLLM is with as many live tokens.

A training step compiles `retrofit_rows`, `budgeted_rows` and `streaming_llm_rows`; `held_out_report` gathers their
results over many batches.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.core.eviction import live_counts
from dms_jax.core.losses import TokenMetrics, token_metrics
from dms_jax.models.decoder import Decoder
from dms_jax.policies.streaming_llm import StreamingLLM

STREAMING_LLM, DMS_BUDGET = "streaming_llm", "dms_budget"
METRICS_GROUPS = {STREAMING_LLM: "sliding_window"}  # the group name of the baseline in metrics.jsonl, a file format


class RowMetrics(NamedTuple):
    """Metrics of a batch of rows."""

    tokens: TokenMetrics  # [B T]
    live: Int[Array, "L B K"]  # pairs that a cache would hold after each row
    evict_fraction: Float[Array, "L B K"]


class EvaluationBatch(NamedTuple):
    """Rows to measure on. Any object with these fields will do, such as a training batch."""

    tokens: np.ndarray  # int32 [B, T]
    segment_ids: np.ndarray  # int32 [B, T]
    loss_mask: np.ndarray  # bool [B, T]

    @classmethod
    def whole(cls, tokens: np.ndarray) -> "EvaluationBatch":
        """Make a batch of rows that hold one document each, without padding."""
        return cls(tokens, np.zeros_like(tokens), np.ones(tokens.shape, bool))


def next_tokens(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    return jnp.roll(tokens, -1, axis=1)


def retrofit_rows(
    student: Decoder,
    teacher: Decoder,
    dense: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    threshold: float | Float[Array, ""] = 0.0,
) -> RowMetrics:
    """Compare the student under its hard decisions with the dense teacher, whose hidden states are `dense`."""
    dms = student.config.require_dms()
    hidden, evict = student.hard_hidden(tokens, segment_ids, threshold)
    return RowMetrics(
        _compared(student, teacher, hidden, dense, tokens),
        live_counts(evict, dms.window_size, dms.decision_shift),
        jnp.mean(evict, axis=-1),
    )


def budgeted_rows(
    student: Decoder,
    teacher: Decoder,
    dense: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    budgets: Int[Array, "L K"],
) -> TokenMetrics:
    """Compare the student within exact budgets of live pairs with the dense teacher. All metrics are [B T]."""
    return _compared(student, teacher, student.budgeted_hidden(tokens, budgets, segment_ids)[0], dense, tokens)


def streaming_llm_rows(
    teacher: Decoder,
    dense: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    policy: StreamingLLM,
) -> TokenMetrics:
    """Compare the dense teacher under StreamingLLM with itself without eviction. All metrics are [B T]."""
    marked = policy.marked(jnp.arange(tokens.shape[1]))
    hidden = teacher.marked_hidden(tokens, marked, policy.window_size, segment_ids)
    return _compared(teacher, teacher, hidden, dense, tokens)


def _compared(model: Decoder, teacher: Decoder, hidden: Array, dense: Array, tokens: Array) -> TokenMetrics:
    return token_metrics(hidden, dense, model.output_embedding(), teacher.output_embedding(), next_tokens(tokens))


@dataclass(frozen=True)
class HeldOutResult:
    """One line of the held-out table. KL is KL(teacher || student) in nats per token, over all tokens of all rows."""

    name: str
    live_tokens: float  # pairs per KV head after a row, mean over layers, heads and rows
    realised_cr: float
    nominal_cr: float  # 1 / (1 - fraction of decisions that evict), the ratio that training aims at
    kl_mean: float
    kl_p95: float
    kl_p99: float
    kl_max: float
    kl_student_teacher: float
    perplexity: float
    dense_perplexity: float
    top1_agreement: float

    @property
    def perplexity_change(self) -> float:
        return self.perplexity / self.dense_perplexity - 1


@dataclass(frozen=True)
class HeldOutReport:
    """Results of the retrofitted model and of the baseline on the same rows, and the pairs that each head keeps."""

    length: int
    num_tokens: int
    results: tuple[HeldOutResult, ...]
    live_per_head: np.ndarray  # [L K] mean live pairs
    evict_per_head: np.ndarray  # [L K] mean fraction of decisions that evict

    def as_metrics(self) -> dict[str, float | list]:
        """Metrics under `group/name` keys, for metrics.jsonl."""
        dms = self.results[0]
        metrics: dict[str, Any] = {f"held_out/{key}": value for key, value in asdict(dms).items() if key != "name"}
        metrics["held_out/perplexity_change"] = dms.perplexity_change
        metrics["held_out/realised_cr_per_layer"] = (self.length / self.live_per_head.mean(axis=1)).round(4).tolist()
        for result in self.results[1:]:
            metrics |= {
                f"{METRICS_GROUPS.get(result.name, result.name)}/{key}": getattr(result, key)
                for key in ("live_tokens", "kl_mean", "perplexity", "perplexity_change")
            }
        return metrics

    def table(self) -> str:
        """Return the table that a run prints at its end."""

        def line(name, live, cr, nominal, *kl, ppl, change, agree):
            tails = "".join(f"{value:>8.3f}" for value in kl[1:])
            sizes = f"{live:>6.0f}{cr:>7.2f}{nominal:>9.2f}"
            return f"{name:<28}{sizes}{kl[0]:>9.4f}{tails}{ppl:>8.2f}{change:>+9.2%}{agree:>8.1%}"

        title = f"held out, {self.num_tokens} tokens"
        columns = f"{'live':>6}{'CR':>7}{'nominal':>9}{'KL mean':>9}{'p95':>8}{'p99':>8}{'max':>8}"
        lines = [f"{title:<28}{columns}{'ppl':>8}{'vs dense':>9}{'top-1':>8}"]
        lines.append(
            line("dense", self.length, 1, 1, 0, 0, 0, 0, ppl=self.results[0].dense_perplexity, change=0, agree=1)
        )
        for result in self.results:
            kl = result.kl_mean, result.kl_p95, result.kl_p99, result.kl_max
            size = result.live_tokens, result.realised_cr, result.nominal_cr
            lines.append(
                line(
                    result.name,
                    *size,
                    *kl,
                    ppl=result.perplexity,
                    change=result.perplexity_change,
                    agree=result.top1_agreement,
                )
            )
        return "\n".join(lines)


class Gathered:
    """Per-token metrics of many batches on the host, restricted to the tokens that count."""

    def __init__(self):
        self.rows: list[TokenMetrics] = []

    def add(self, metrics: TokenMetrics, counted: Bool[Array, "B T"]) -> None:
        self.rows.append(TokenMetrics(*(np.asarray(x, np.float64)[np.asarray(counted)] for x in metrics)))

    def result(self, name: str, length: int, live: float, evict_fraction: float) -> HeldOutResult:
        all_rows = TokenMetrics(*(np.concatenate(parts) for parts in zip(*self.rows, strict=True)))
        kl = all_rows.kl_teacher_student
        p95, p99 = np.percentile(kl, [95, 99])
        return HeldOutResult(
            name=name,
            live_tokens=live,
            realised_cr=length / live,
            nominal_cr=1 / max(1e-9, 1 - evict_fraction),
            kl_mean=float(kl.mean()),
            kl_p95=float(p95),
            kl_p99=float(p99),
            kl_max=float(kl.max()),
            kl_student_teacher=float(all_rows.kl_student_teacher.mean()),
            perplexity=float(np.exp(all_rows.student_nll.mean())),
            dense_perplexity=float(np.exp(all_rows.teacher_nll.mean())),
            top1_agreement=float(all_rows.agree.mean()),
        )


def counted_tokens(loss_mask: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Mark the tokens [B T] whose next token is in the row and belongs to the same document."""
    counted = np.zeros_like(loss_mask)
    counted[:, :-1] = loss_mask[:, :-1] & loss_mask[:, 1:] & (segment_ids[:, :-1] == segment_ids[:, 1:])
    return counted


def held_out_report(
    batches: Iterable[EvaluationBatch],
    length: int,
    retrofit: Callable[[EvaluationBatch], RowMetrics],
    streaming_llm: Callable[[EvaluationBatch, StreamingLLM], TokenMetrics] | None = None,
    budgeted: Callable[[EvaluationBatch, int], TokenMetrics] | None = None,
) -> HeldOutReport:
    """Measure the retrofitted model on `batches` of rows of `length` tokens, then the others with as many live tokens.

    The callables run one batch on the devices; None leaves one out. `budgeted` gets the mean budget of all heads.
    """
    batches = list(batches)
    gathered, live, evict = Gathered(), [], []
    for batch in batches:
        metrics = jax.device_get(retrofit(batch))
        gathered.add(metrics.tokens, counted_tokens(batch.loss_mask, batch.segment_ids))
        live.append(metrics.live)
        evict.append(metrics.evict_fraction)
    live, evict = np.concatenate(live, axis=1).mean(axis=1), np.concatenate(evict, axis=1).mean(axis=1)
    results = [gathered.result("dms", length, float(live.mean()), float(evict.mean()))]

    def of_budget(name: str, pairs: int, run: Callable[[EvaluationBatch], TokenMetrics]) -> HeldOutResult:
        rows = Gathered()
        for batch in batches:
            rows.add(jax.device_get(run(batch)), counted_tokens(batch.loss_mask, batch.segment_ids))
        return rows.result(name, length, min(pairs, length), 1 - min(pairs, length) / length)

    pairs = round(float(live.mean()))
    if budgeted is not None:
        results.append(of_budget(DMS_BUDGET, pairs, lambda batch: budgeted(batch, pairs)))
    if streaming_llm is not None:
        policy = StreamingLLM(budget=max(pairs, StreamingLLM.num_sinks + 1))
        results.append(of_budget(STREAMING_LLM, policy.budget, lambda batch: streaming_llm(batch, policy)))
    return HeldOutReport(length, sum(len(rows.agree) for rows in gathered.rows), tuple(results), live, evict)
