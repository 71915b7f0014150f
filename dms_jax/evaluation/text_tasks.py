"""The tasks on given text, under their names in --tasks: what each measures, and the table that it prints.

To add a task, write its class here and its record in `result_records.RECORDS`. Tasks that have answers are in
`dms_jax.tasks.registry`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

import dms_jax
from dms_jax.core.cache_base import compression_ratio, nominal_compression_ratio
from dms_jax.core.eviction import align_to_pairs
from dms_jax.core.visibility import expiry_of
from dms_jax.engine.generation import Generation
from dms_jax.evaluation.methods import Method, Setup, ranked_pairs
from dms_jax.evaluation.result_records import GreedyRecord, KeptRecord, Record, TextRecord
from dms_jax.evaluation.results import rounded
from dms_jax.evaluation.table_kinds import GreedyTable, Table, TextTable
from dms_jax.evaluation.teacher_forced import dense_hidden, online_rows
from dms_jax.evaluation.text_measure import Batch, TextMeasure
from dms_jax.models.decoder import Decoder, with_window


class TextTask(Protocol):
    """One kind of measurement on given text."""

    @property
    def name(self) -> str: ...
    @property
    def table(self) -> Table | None: ...  # None: only a report shows the task

    def num_rows(self, run: TextMeasure) -> int:
        """Return the rows on which each method is measured, for the progress bar; 0 for a task that is quick."""
        ...

    def measure(self, run: TextMeasure, method: Method, on_rows: Callable[[int], Any]) -> None:
        """Append the measurements that the results file lacks. Calls `on_rows` with the number of finished rows."""
        ...


class RowTask:
    """A task that measures every row of every domain; its subclasses make the records of a batch."""

    name: str

    def num_rows(self, run: TextMeasure) -> int:
        return run.num_rows

    def measure(self, run: TextMeasure, method: Method, on_rows: Callable[[int], Any]) -> None:
        for batch in run.batches():
            if missing := run.missing(self.name, method, batch.units):
                for record in self.records(run, method, batch):
                    if record.unit in missing:
                        run.file.append(record)
            on_rows(len(batch.units))

    def records(self, run: TextMeasure, method: Method, batch: Batch) -> Iterable[Record]:
        """Measure all rows of a batch and yield a record of each."""
        raise NotImplementedError


class TeacherForced(RowTask):
    """Measure KL to the dense model and perplexity at every position of each row, with the cache of decoding."""

    name = "text"
    table = TextTable()

    def records(self, run: TextMeasure, method: Method, batch: Batch) -> Iterable[TextRecord]:
        rows = batch.rows
        if (self.name, batch.key) not in run.dense_results:
            run.dense_results[self.name, batch.key] = np.asarray(dense_hidden(run.model, rows))
        setup = run.setup(method, batch.domain)
        dense = run.dense_results[self.name, batch.key]
        out = online_rows(run.model, dense, rows, setup.policy, setup.threshold, run.chunk)
        live = np.asarray(out.cache.live_counts, np.float64).mean(axis=(0, 2))
        for b, unit in enumerate(batch.units):
            cache = jax.tree.map(lambda x, b=b: x[b : b + 1], out.cache)
            nominal = nominal_compression_ratio if method.kind.is_learned else compression_ratio
            yield TextRecord(
                task=self.name,
                policy=method.policy,
                budget=method.budget,
                unit=unit,
                domain=batch.domain.name,
                length=rows.shape[1],
                live_tokens=float(live[b]),
                mean_live_tokens=float(out.live_by_chunk[b].mean()),
                pairs_read=float(setup.policy.pairs_read(live[b])),
                realised_cr=float(compression_ratio(cache)),
                nominal_cr=float(nominal(cache)),
                threshold=setup.threshold,
                agree=float(out.tokens.agree[b, :-1].mean()),
                kl=rounded(out.tokens.kl_teacher_student[b, :-1]),
                nll=rounded(out.tokens.student_nll[b, :-1]),
            )


class GreedyMatch(RowTask):
    """Compare greedy continuations by the method and by the dense model of rows whose last `greedy_tokens` are cut."""

    name = "greedy"
    table = GreedyTable()

    def records(self, run: TextMeasure, method: Method, batch: Batch) -> Iterable[GreedyRecord]:
        rows = batch.rows[:, : -run.greedy_tokens]
        if (self.name, batch.key) not in run.dense_results:
            run.dense_results[self.name, batch.key] = _continued(run, rows, run.calibrator.dense()).tokens
        dense, out = run.dense_results[self.name, batch.key], _continued(run, rows, run.setup(method, batch.domain))
        for b, unit in enumerate(batch.units):
            same = dense[b] == out.tokens[b]
            yield GreedyRecord(
                task=self.name,
                policy=method.policy,
                budget=method.budget,
                unit=unit,
                domain=batch.domain.name,
                tokens=run.greedy_tokens,
                match=float(same.mean()),
                divergence=run.greedy_tokens if same.all() else int(np.argmin(same)),
                live_tokens=float(out.live_pairs[b]),
                realised_cr=float(out.realised_cr[b]),
            )


def _continued(run: TextMeasure, rows: np.ndarray, setup: Setup) -> Generation:
    length = rows.shape[1] + run.greedy_tokens
    max_pairs = ranked_pairs(setup.policy)
    config = dms_jax.GenerationConfig(
        max_new_tokens=run.greedy_tokens,
        stop_ids=(),
        policy=setup.policy,
        threshold=setup.threshold,
        chunk_size=None if max_pairs is None else run.chunk,
        capacity=min(max_pairs or length, length),
    )
    return dms_jax.generate(run.model, rows, config)


class Retention:
    """Record which pairs a learned policy still holds after the first row of each domain, by token and by head."""

    name = "kept"
    table = None

    def num_rows(self, run: TextMeasure) -> int:
        return 0

    def measure(self, run: TextMeasure, method: Method, on_rows: Callable[[int], Any]) -> None:
        if not method.kind.is_learned:
            return
        for domain in run.domains:
            unit = f"{domain.name}/0"
            if not run.missing(self.name, method, [unit]):
                continue
            setup, tokens = run.setup(method, domain), domain.rows[:1]
            retained = retention(_expiries(run.model, setup, tokens)[:, 0])
            run.file.append(
                KeptRecord(
                    task=self.name,
                    policy=method.policy,
                    budget=method.budget,
                    unit=unit,
                    domain=domain.name,
                    length=tokens.shape[1],
                    pieces=[run.tokenizer.decode(tokens[0, t : t + 1]) for t in range(tokens.shape[1])],
                    kept=rounded(retained.fraction),
                    live_per_head=retained.live_per_head.tolist(),
                    live_by_position=rounded(retained.live_by_position),
                    window_size=setup.policy.window_size,
                    realised_cr=float(tokens.shape[1] / retained.live_by_position[-1]),
                )
            )


@dataclass(frozen=True)
class RetainedPairs:
    """The pairs of one row that remain in the cache."""

    fraction: np.ndarray  # [T] fraction of (layer, head) that hold each token's pair after the row
    live_per_head: np.ndarray  # int [L K] after the row
    live_by_position: np.ndarray  # [T] pairs after each token, mean over layers and heads


def _expiries(model: Decoder, setup: Setup, tokens: np.ndarray) -> np.ndarray:
    """Return the expiries [L B K T] of the pairs of whole rows under a learned policy."""
    config, policy = model.config, setup.policy
    table = policy.budget_table(config.num_layers, config.num_kv_heads)
    if table is not None:
        return np.asarray(model.budgeted_hidden(tokens, table)[1])
    _, evict = with_window(model, policy.window_size).hard_hidden(tokens, None, setup.threshold)
    marked = align_to_pairs(evict, config.require_dms().decision_shift, False)
    return np.asarray(expiry_of(marked, np.arange(tokens.shape[1], dtype=np.int32), policy.window_size))


def retention(expiry: np.ndarray) -> RetainedPairs:
    """Return which pairs of one row are still held after it, and how many after each token, by their expiries
    [L K T]."""
    length, left = expiry.shape[-1], np.sort(expiry, axis=-1)
    now = np.arange(length)
    gone = np.stack([np.searchsorted(head, now) for head in left.reshape(-1, length)]).reshape(expiry.shape)
    live = now + 1 - gone  # pairs that expired before each token are gone
    retained = expiry >= length - 1
    return RetainedPairs(retained.mean(axis=(0, 1)), live[..., -1], live.mean(axis=(0, 1)))


_ALL: tuple[TextTask, ...] = (TeacherForced(), GreedyMatch(), Retention())
TEXT_TASKS: dict[str, TextTask] = {task.name: task for task in _ALL}
