"""The tables of an evaluation, with one class for each kind of task: which lines a table has, as plain values, and how
a line is printed. Imports no JAX."""

import math
from collections.abc import Iterable
from typing import Any, Protocol

from dms_jax.evaluation.aggregate import (
    AnswerResult,
    TextGroup,
    TextResult,
    answer_results,
    greedy_results,
    text_groups,
)
from dms_jax.evaluation.result_records import GreedyRecord, Record, ScoredRecord, TextRecord
from dms_jax.evaluation.statistics import Interval

Line = dict[str, Any]


class Table(Protocol):
    def lines(self, records: Iterable[Record]) -> list[Line]:
        """Return one line per method. Records of other tasks are ignored."""
        ...

    def header(self, line: Line) -> str: ...

    def row(self, line: Line) -> str: ...

    def footer(self, lines: list[Line]) -> list[str]:
        """Return the lines of text that follow the rows of a header."""
        ...


class TextTable:
    """KL with its tails and perplexity on given text, first over whole rows and then by position in the row."""

    def lines(self, records: Iterable[Record]) -> list[Line]:
        groups = text_groups([record for record in records if isinstance(record, TextRecord)])
        return [self._line(group, result) for group in groups for result in group.results]

    def _line(self, group: TextGroup, result: TextResult) -> Line:
        return {
            "task": "text",
            "domain": group.domain,
            "length": group.length,
            "budget": group.budget,
            "arm": result.name,
            "rows": result.kl.units,
            "live_tokens": result.live_tokens,
            "realised_cr": result.realised_cr,
            "nominal_cr": result.nominal_cr,
            **_interval("kl_mean", result.kl),
            "kl_p95": result.kl_p95,
            "kl_p99": result.kl_p99,
            "kl_max": result.kl_max,
            "perplexity": result.perplexity,
            "perplexity_change": _none_for_nan(result.perplexity_change),
            **_interval("top1_agreement", result.agree),
            "by_position": [
                {"from": s.first, "to": s.last, "kl_mean": s.kl_mean, "kl_p99": s.kl_p99, "perplexity": s.perplexity}
                for s in result.stretches
            ],
        }

    def header(self, line: Line) -> str:
        budget = f", {line['budget']} live" if line["budget"] else ""
        title = f"{line['domain']}, {line['rows']} rows of {line['length']}{budget}"
        sizes = f"{'live':>6}{'CR':>7}{'nominal':>9}"
        kl = f"{'KL mean':>9}{'(95%)':>17}{'p95':>8}{'p99':>8}{'max':>8}"
        return f"{title:<34}{sizes}{kl}{'ppl':>8}{'vs dense':>9}{'top-1':>8}"

    def row(self, line: Line) -> str:
        sizes = f"{line['live_tokens']:>6.0f}{line['realised_cr']:>7.2f}{line['nominal_cr']:>9.2f}"
        tails = "".join(f"{line[key]:>8.3f}" for key in ("kl_p95", "kl_p99", "kl_max"))
        kl = f"{line['kl_mean']:>9.4f}{_range(line, 'kl_mean', 4):>17}{tails}"
        change = "" if line["perplexity_change"] is None else f"{line['perplexity_change']:+.2%}"
        return f"{line['arm']:<34}{sizes}{kl}{line['perplexity']:>8.2f}{change:>9}{line['top1_agreement']:>8.1%}"

    def footer(self, lines: list[Line]) -> list[str]:
        """Return a second table, with KL and perplexity by position in the row."""
        buckets = "".join(f"{bucket['from']:>11}-{bucket['to']:<11}" for bucket in lines[0]["by_position"])
        rows = ["", f"{'by position: KL mean, p99, ppl':<34}{buckets}"]
        for line in lines:
            cells = [f"{b['kl_mean']:>9.4f}{b['kl_p99']:>7.2f}{b['perplexity']:>7.1f}" for b in line["by_position"]]
            rows.append(f"{line['arm']:<34}{''.join(cells)}")
        return rows


class GreedyTable:
    """Agreement of greedy continuations with those of the dense model."""

    def lines(self, records: Iterable[Record]) -> list[Line]:
        return [
            {
                "task": "greedy",
                "domain": result.domain,
                "arm": result.name,
                "live_tokens": result.live_tokens,
                "realised_cr": result.realised_cr,
                **_interval("match", result.match),
                "median_divergence": result.divergence,
                "tokens": result.tokens,
            }
            for result in greedy_results([record for record in records if isinstance(record, GreedyRecord)])
        ]

    def header(self, line: Line) -> str:
        title = f"greedy match, {line['domain']}, {line['tokens']:.0f} tokens"
        return f"{title:<40}{'live':>6}{'CR':>7}{'match':>8}{'(95%)':>17}{'diverges at (median)':>22}"

    def row(self, line: Line) -> str:
        sizes = f"{line['live_tokens']:>6.0f}{line['realised_cr']:>7.2f}"
        match = f"{line['match']:>8.1%}{_range(line, 'match', 3):>17}"
        return f"{line['arm']:<40}{sizes}{match}{line['median_divergence']:>22.0f}"

    def footer(self, lines: list[Line]) -> list[str]:
        return []


class AnswerTable:
    """Scores and costs of the tasks that have answers."""

    def lines(self, records: Iterable[Record]) -> list[Line]:
        return [
            self._line(result)
            for result in answer_results([record for record in records if isinstance(record, ScoredRecord)])
        ]

    def _line(self, result: AnswerResult) -> Line:
        line = {
            "task": result.task,
            "arm": result.name,
            "live_tokens": result.live_tokens,
            "realised_cr": result.realised_cr,
            **_interval("score", result.accuracy),
            "problems": result.accuracy.units,
            "answer_logprob": _none_for_nan(result.answer_logprob),
            "kv_reads": result.kv_reads,
            "peak_live": result.peak_live,
        }
        if result.samples is not None:
            line |= {"chains": result.samples.count, **_interval("vote", result.samples.vote)}
            line |= {f"pass@{k}": value for k, value in result.samples.pass_at.items()}
        return line

    def header(self, line: Line) -> str:
        title = f"{line['task']}, {line['problems']} answers"
        costs = f"{'KV reads':>10}{'peak live':>10}"
        return f"{title:<34}{'live':>6}{'CR':>7}{'score':>8}{'(95%)':>17}{'log p(answer)':>15}{costs}"

    def row(self, line: Line) -> str:
        sizes = f"{line['live_tokens']:>6.0f}{line['realised_cr']:>7.2f}"
        score = f"{line['score']:>8.1%}{_range(line, 'score', 3):>17}"
        logprob = "-" if line["answer_logprob"] is None else f"{line['answer_logprob']:.2f}"
        samples = ""
        if "chains" in line:
            pass_at = [f"{key} {value:.1%}" for key, value in line.items() if key.startswith("pass@")]
            samples = f"  vote {line['vote']:.1%}, {', '.join(pass_at)}"
        costs = f"{line['kv_reads']:>10.0f}{line['peak_live']:>10.0f}"
        return f"{line['arm']:<34}{sizes}{score}{logprob:>15}{costs}{samples}"

    def footer(self, lines: list[Line]) -> list[str]:
        return []


def _interval(name: str, interval: Interval) -> Line:
    return {
        name: interval.value,
        f"{name}_low": _none_for_nan(interval.low),
        f"{name}_high": _none_for_nan(interval.high),
    }


def _range(line: Line, name: str, digits: int) -> str:
    low, high = line[f"{name}_low"], line[f"{name}_high"]
    return "" if low is None else f"{low:.{digits}f}-{high:.{digits}f}"


def _none_for_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
