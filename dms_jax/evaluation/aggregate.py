"""Aggregate the records of results files for tables and reports: methods compared on text and on answers, and the pairs
that DMS keeps.

A *result* is one method (a policy at a budget) with everything that was measured for it on one text or task. Imports no
JAX.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dms_jax.command import typed_as
from dms_jax.errors import ConfigError
from dms_jax.evaluation.result_records import (
    RECORDS,
    AnswerRecord,
    GreedyRecord,
    KeptRecord,
    Record,
    ScoredRecord,
    TextRecord,
)
from dms_jax.evaluation.results import read_results
from dms_jax.evaluation.statistics import Interval, bootstrap_mean, percentiles, wilson
from dms_jax.tasks.votes import majority_vote, pass_at_k

NUM_STRETCHES = 4  # parts of a row with numbers of their own, because an early eviction costs late in the row
PASS_AT = (1, 2, 4, 8, 16, 32, 64, 128)


class Measured(NamedTuple):
    headers: dict[str, dict[str, Any]]  # file -> provenance
    records: list[Record]

    def kind(self, kind: str) -> list[Any]:
        """Return the records of a task on given text; for "answers", those of all tasks with answers."""
        return [record for record in self.records if kind_of(record) == kind]


class Stretch(NamedTuple):
    """Tokens `first` to `last` of each row."""

    first: int
    last: int
    kl_mean: float
    kl_p99: float
    perplexity: float


class TextResult(NamedTuple):
    """One method on the rows of one domain. KL is KL(dense || method) in nats per predicted token."""

    name: str
    policy: str
    live_tokens: float  # pairs per KV head after a row, mean over layers, heads and rows
    realised_cr: float
    nominal_cr: float
    kl: Interval  # over rows
    kl_p95: float
    kl_p99: float
    kl_max: float
    perplexity: float
    perplexity_change: float  # relative to dense on the same rows; nan if dense was not measured
    agree: Interval  # over rows
    kl_rows: dict[str, np.ndarray]  # unit -> KL by position
    stretches: tuple[Stretch, ...]  # empty if the rows differ in length

    @property
    def kl_tokens(self) -> np.ndarray:
        return np.concatenate(list(self.kl_rows.values()))


class TextGroup(NamedTuple):
    """Results that can be compared, on one domain and length and at one budget in live tokens (None: without
    budgets)."""

    domain: str
    length: int
    budget: int | None
    results: tuple[TextResult, ...]  # by mean KL


class Samples(NamedTuple):
    """Several sampled answers to each problem."""

    count: int  # samples of the problem that has the fewest
    vote: Interval  # accuracy of the majority's answer
    pass_at: dict[int, float]  # k -> probability that at least one of k samples is right


class AnswerResult(NamedTuple):
    """One method on the problems of one task."""

    task: str
    name: str
    policy: str
    accuracy: Interval
    live_tokens: float
    realised_cr: float
    kv_reads: float
    peak_live: float
    answer_logprob: float  # mean log p of the reference answer; nan if not measured
    cells: dict[tuple[float, float], Interval]  # (length, depth) -> accuracy, for tasks with a depth
    samples: Samples | None  # None: one sample per problem


class GreedyResult(NamedTuple):
    """One method's greedy continuations of the rows of one domain."""

    domain: str
    name: str
    policy: str
    match: Interval
    divergence: float  # median index of the first token that differs
    tokens: float
    live_tokens: float
    realised_cr: float


class RetentionResult(NamedTuple):
    """The pairs of the rows of one domain that remain under one learned method. `pieces` and `kept` show the first row
    token by token."""

    domain: str
    name: str
    length: int
    window_size: int
    rows: int
    live_per_head: np.ndarray  # [L K] at the end, mean over rows
    live_by_position: np.ndarray  # [T] mean over rows and heads
    pieces: tuple[str, ...]
    kept: np.ndarray  # [T] fraction of (layer, head) that still hold the token after the row

    @property
    def realised_cr(self) -> float:
        return self.length / float(self.live_per_head.mean())


def kind_of(record: Record) -> str:
    return record.task if record.task in RECORDS else "answers"


def read_measured(paths: Sequence[str]) -> Measured:
    """Read the measurements of several files. Raises ConfigError for a record that is damaged or that contradicts
    another file."""
    headers: dict[str, dict[str, Any]] = {}
    seen: dict[Any, Record] = {}
    for path in dict.fromkeys(paths):
        results = read_results(path)
        headers[path] = clean(results.header)
        for where, raw in zip(results.places, results.records, strict=True):
            record = type(raw)(**clean(vars(raw)))
            if repr(seen.setdefault(record.key, record)) != repr(record):  # repr: nan equals nan
                raise ConfigError(
                    f"{where}: {' '.join(record.key)} has two different results; make one report per file instead"
                )
    if not seen:
        raise ConfigError(
            f"no measurement in {', '.join(map(str, paths))}; run {typed_as('evaluate')} with --output first"
        )
    return Measured(headers, list(seen.values()))


def clean(value: Any) -> Any:
    """Make all strings of a JSON value encodable in UTF-8: half a surrogate pair becomes the replacement character."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list) else value


def text_groups(records: Iterable[TextRecord]) -> list[TextGroup]:
    """Group results by domain, length and budget. Dense is in every group. A result without a budget joins the group
    whose budget is nearest to its live tokens."""
    groups = []
    for (domain, length), rows in grouped(records, lambda r: (r.domain, r.length)).items():
        dense = {r.unit: r for r in rows if r.policy == "dense"}
        by_method = grouped(rows, lambda r: (r.method, _budget_tokens(r.budget, r.length)))
        results = {name: (budget, _text_result(found, dense)) for (name, budget), found in by_method.items()}
        budgets = _merged({budget for budget, _ in results.values() if budget})
        members = defaultdict(list)
        for budget, result in results.values():
            if result.policy == "dense":
                continue
            members[budgets[budget] if budget else _nearest(set(budgets.values()), result.live_tokens)].append(result)
        for budget in sorted(members, key=lambda b: b or 0, reverse=True) or [None]:
            compared = members[budget] + [result for _, result in results.values() if result.policy == "dense"]
            groups.append(
                TextGroup(domain, length, budget, tuple(sorted(compared, key=lambda result: result.kl.value)))
            )
    return groups


def answer_results(records: Iterable[ScoredRecord]) -> list[AnswerResult]:
    """Measurements by task, in the order of the file, the most accurate first."""
    results = [
        _answer_result(task, name, rows)
        for (task, name), rows in grouped(records, lambda r: (r.task, r.method)).items()
    ]
    tasks = list(dict.fromkeys(result.task for result in results))
    return sorted(results, key=lambda result: (tasks.index(result.task), -result.accuracy.value, result.live_tokens))


def greedy_results(records: Iterable[GreedyRecord]) -> list[GreedyResult]:
    """Measurements by domain, the one that agrees most with dense first."""
    results = [
        GreedyResult(
            domain=domain,
            name=name,
            policy=rows[0].policy,
            match=bootstrap_mean([r.match for r in rows]),
            divergence=float(np.median([r.divergence for r in rows])),
            tokens=_mean(r.tokens for r in rows),
            live_tokens=_mean(r.live_tokens for r in rows),
            realised_cr=_mean(r.realised_cr for r in rows),
        )
        for (domain, name), rows in grouped(records, lambda r: (r.domain, r.method)).items()
    ]
    return sorted(results, key=lambda result: (result.domain, -result.match.value))


def retention_results(records: Iterable[KeptRecord]) -> list[RetentionResult]:
    found = grouped(records, lambda r: (r.domain, r.method, r.length, np.shape(r.live_per_head)))
    return [
        RetentionResult(
            domain=domain,
            name=name,
            length=length,
            window_size=rows[0].window_size,
            rows=len(rows),
            live_per_head=np.mean([r.live_per_head for r in rows], axis=0),
            live_by_position=np.mean([r.live_by_position for r in rows], axis=0),
            pieces=tuple(rows[0].pieces),
            kept=np.asarray(rows[0].kept, float),
        )
        for (domain, name, length, _), rows in found.items()
    ]


def _text_result(rows: list[TextRecord], dense: dict[str, TextRecord]) -> TextResult:
    kl = {r.unit: np.asarray(r.kl, float) for r in rows}
    tokens = [len(row) for row in kl.values()]
    p95, p99, largest = percentiles(np.concatenate(list(kl.values())), (95, 99, 100))
    common = [r for r in rows if r.unit in dense]  # an interrupted run may have measured fewer rows
    change = math.nan
    if common:
        change = math.expm1(min(_mean_nll(common) - _mean_nll([dense[r.unit] for r in common]), 700))
    live = _mean(r.live_tokens for r in rows)
    return TextResult(
        name=rows[0].method,
        policy=rows[0].policy,
        live_tokens=live,
        realised_cr=_mean(r.length for r in rows) / live if live else math.inf,
        nominal_cr=_mean(r.nominal_cr for r in rows),
        kl=bootstrap_mean([row.mean() for row in kl.values()], tokens),
        kl_p95=p95,
        kl_p99=p99,
        kl_max=largest,
        perplexity=math.exp(min(_mean_nll(rows), 700)),
        perplexity_change=change,
        agree=bootstrap_mean([r.agree for r in rows], tokens),
        kl_rows=kl,
        stretches=_stretches(rows),
    )


def _stretches(rows: list[TextRecord]) -> tuple[Stretch, ...]:
    """Return KL and perplexity in each quarter of the rows."""
    if len({len(r.kl) for r in rows}) > 1:
        return ()
    kl, nll = np.array([r.kl for r in rows], float), np.array([r.nll for r in rows], float)
    edges = [round(i * (kl.shape[1] + 1) / NUM_STRETCHES) for i in range(NUM_STRETCHES + 1)]
    return tuple(
        Stretch(
            first=first,
            last=last - 1,
            kl_mean=float(kl[:, first:last].mean()),
            kl_p99=percentiles(kl[:, first:last], (99,))[0],
            perplexity=math.exp(min(nll[:, first:last].mean(), 700)),
        )
        for first, last in itertools.pairwise(edges)
        if kl[:, first:last].size
    )


def _answer_result(task: str, name: str, rows: list[ScoredRecord]) -> AnswerResult:
    logprobs = [r.answer_logprob for r in rows if isinstance(r, AnswerRecord) and r.answer_logprob is not None]
    cells = grouped([r for r in rows if _has_cell(r)], lambda r: (float(r.groups["length"]), float(r.groups["depth"])))
    return AnswerResult(
        task=task,
        name=name,
        policy=rows[0].policy,
        accuracy=_accuracy(rows),
        live_tokens=_mean(r.live_tokens for r in rows),
        realised_cr=_mean(r.realised_cr for r in rows),
        kv_reads=_mean(r.kv_reads for r in rows),
        peak_live=_mean(r.peak_live for r in rows),
        answer_logprob=_mean(logprobs) if logprobs else math.nan,
        cells={cell: _accuracy(found) for cell, found in cells.items()},
        samples=_samples([r for r in rows if isinstance(r, AnswerRecord)]),
    )


def _samples(rows: list[AnswerRecord]) -> Samples | None:
    problems = list(grouped(rows, lambda r: r.problem_id).values())
    count = min(map(len, problems), default=1)
    if count == 1:
        return None
    elected = [samples[majority_vote([r.extracted for r in samples])].score for samples in problems]
    pass_at = {
        k: _mean(pass_at_k(len(samples), sum(r.score == 1 for r in samples), k) for samples in problems)
        for k in PASS_AT
        if k <= count
    }
    return Samples(count, wilson(sum(elected), len(elected)), pass_at)


def _budget_tokens(budget: str, length: float) -> int | None:
    """Return the live tokens that a budget means in a row of `length`: "256" is 256, and "cr4" is a quarter of the
    row."""
    number = budget.removeprefix("cr")
    try:
        value = float(number)
    except ValueError:
        return None
    if not 0 < value < math.inf:
        return None
    return max(1, round(length / value if budget != number else value))


def _merged(budgets: set[int]) -> dict[int, int]:
    """Map each budget to the one under which it is shown. Budgets within 3% are merged ("341" and "cr3" of 1024)."""
    shown = {}
    for budget in sorted(budgets):
        last = next(reversed(shown.values()), None)
        shown[budget] = last if last and budget <= 1.03 * last else budget
    return shown


def _nearest(budgets: set[int], live_tokens: float) -> int | None:
    """Return the budget under which a result without one is compared: the nearest budget if it is at most a quarter
    away, else the result's own live tokens."""
    live = max(1, round(live_tokens))
    near = min(budgets, key=lambda budget: abs(math.log(budget / live)), default=None)
    return near if near is None or 0.8 < near / live < 1.25 else live


def _mean_nll(rows: list[TextRecord]) -> float:
    return _mean(np.concatenate([np.asarray(r.nll, float) for r in rows]))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(values if isinstance(values, np.ndarray) else list(values)))


def _accuracy(rows: list[ScoredRecord]) -> Interval:
    """Return the accuracy over problems. The samples of one problem depend on each other, so their mean is one
    trial."""
    problems = grouped(rows, lambda r: r.problem_id).values()
    return wilson(sum(_mean(r.score for r in samples) for samples in problems), len(problems))


def _has_cell(record: ScoredRecord) -> bool:
    values = (record.groups.get("length"), record.groups.get("depth"))
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Group items by their key, in the order of the first item of each group."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups
