"""The tables that `infer.evaluate` prints: a line an arm, with 95% intervals."""

import itertools
import math

import numpy as np

from dms_jax.evaluation.aggregate import answer_arms, greedy_arms, text_groups
from dms_jax.evaluation.results import TEXT_TASKS, arm_name, problem_of
from dms_jax.evaluation.statistics import Interval, percentiles, wilson
from dms_jax.tasks.votes import majority_vote, pass_at_k

POSITION_BUCKETS = 4  # of a row: what is missing late in it was decided early


def summary(records: list[dict]) -> list[dict]:
    """One plain object a line of the tables, of all records of a file."""
    kind = lambda *names: [record for record in records if record["task"] in names]
    lines = []
    for group in text_groups(kind("text")):
        for arm in group.arms:
            lines.append(
                {
                    "task": "text",
                    "domain": group.domain,
                    "length": group.length,
                    "budget": group.budget,
                    "arm": arm.name,
                    "rows": arm.kl.units,
                    "live_tokens": arm.live_tokens,
                    "realised_cr": arm.realised_cr,
                    "nominal_cr": arm.nominal_cr,
                    **_interval("kl_mean", arm.kl),
                    "kl_p95": arm.kl_p95,
                    "kl_p99": arm.kl_p99,
                    "kl_max": arm.kl_max,
                    "perplexity": arm.perplexity,
                    "perplexity_change": _number(arm.perplexity_change),
                    **_interval("top1_agreement", arm.agree),
                    "by_position": _by_position(
                        [
                            r
                            for r in kind("text")
                            if r["domain"] == group.domain and r["length"] == group.length and arm_name(r) == arm.name
                        ]
                    ),
                }
            )
    for arm in greedy_arms(kind("greedy")):
        lines.append(
            {
                "task": "greedy",
                "domain": arm.domain,
                "arm": arm.name,
                "live_tokens": arm.live_tokens,
                "realised_cr": arm.realised_cr,
                **_interval("match", arm.match),
                "median_divergence": arm.divergence,
                "tokens": arm.tokens,
            }
        )
    for arm in answer_arms([record for record in records if record["task"] not in TEXT_TASKS]):
        lines.append(
            {
                "task": arm.task,
                "arm": arm.name,
                "live_tokens": arm.live_tokens,
                "realised_cr": arm.realised_cr,
                **_interval("score", arm.accuracy),
                "problems": arm.accuracy.units,
                "answer_logprob": _number(arm.answer_logprob),
                "kv_reads": arm.kv_reads,
                "peak_live": arm.peak_live,
                **_of_chains([r for r in records if r["task"] == arm.task and arm_name(r) == arm.name]),
            }
        )
    return lines


def _by_position(records: list[dict]) -> list[dict]:
    """KL and perplexity of each quarter of the rows."""
    kl, nll = (np.array([record[key] for record in records], float) for key in ("kl", "nll"))
    edges = [round(i * (kl.shape[1] + 1) / POSITION_BUCKETS) for i in range(POSITION_BUCKETS + 1)]
    return [
        {
            "from": first,
            "to": last - 1,
            "kl_mean": float(kl[:, first:last].mean()),
            "kl_p99": percentiles(kl[:, first:last], (99,))[0],
            "perplexity": math.exp(nll[:, first:last].mean()),
        }
        for first, last in itertools.pairwise(edges)
        if kl[:, first:last].size
    ]


def _of_chains(records: list[dict]) -> dict:
    """What several chains a problem are drawn for: the accuracy of their vote, and the chance that one of k is right (code: passes)."""
    problems: dict[str, list[dict]] = {}
    for record in records:
        problems.setdefault(problem_of(record), []).append(record)
    chains = min(map(len, problems.values()))
    if chains == 1:
        return {}
    voted = [mine[majority_vote([record["extracted"] for record in mine])]["score"] for mine in problems.values()]
    line: dict = {"chains": chains, **_interval("vote", wilson(sum(voted), len(voted)))}
    for k in (k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= chains):
        line[f"pass@{k}"] = float(
            np.mean(
                [pass_at_k(len(mine), sum(record["score"] == 1 for record in mine), k) for mine in problems.values()]
            )
        )
    return line


def table(lines: list[dict]) -> str:
    """The same for people."""
    out, before = [], None
    titles = [(line["task"], line.get("domain"), line.get("budget")) for line in lines]
    for line, title, after in zip(lines, titles, [*titles[1:], None], strict=True):
        if title != before:
            out += [""] * bool(out) + [_header(line)]
            before = title
        out.append(_row(line))
        if line["task"] == "text" and after != before:
            out += [
                "",
                *_position_table(
                    [other for other in lines if (other["task"], other.get("domain"), other.get("budget")) == before]
                ),
            ]
    return "\n".join(out)


def _position_table(lines: list[dict]) -> list[str]:
    """The tails again, by where in the row a token is."""
    buckets = "".join(f"{bucket['from']:>11}-{bucket['to']:<11}" for bucket in lines[0]["by_position"])
    rows = [f"{'by position: KL mean, p99, ppl':<34}{buckets}"]
    for line in lines:
        cells = "".join(f"{b['kl_mean']:>9.4f}{b['kl_p99']:>7.2f}{b['perplexity']:>7.1f}" for b in line["by_position"])
        rows.append(f"{line['arm']:<34}{cells}")
    return rows


def _header(line: dict) -> str:
    if line["task"] == "text":
        title = f"{line['domain']}, {line['rows']} rows of {line['length']}" + (
            f", {line['budget']} live" if line["budget"] else ""
        )
        sizes = f"{'live':>6}{'CR':>7}{'nominal':>9}"
        return f"{title:<34}{sizes}{'KL mean':>9}{'(95%)':>17}{'p95':>8}{'p99':>8}{'max':>8}{'ppl':>8}{'vs dense':>9}{'top-1':>8}"
    if line["task"] == "greedy":
        title = f"greedy match, {line['domain']}, {line['tokens']:.0f} tokens"
        return f"{title:<40}{'live':>6}{'CR':>7}{'match':>8}{'(95%)':>17}{'diverges at (median)':>22}"
    title = f"{line['task']}, {line['problems']} answers"
    return f"{title:<34}{'live':>6}{'CR':>7}{'score':>8}{'(95%)':>17}{'log p(answer)':>15}{'KV reads':>10}{'peak live':>10}"


def _row(line: dict) -> str:
    name = line["arm"]
    if line["task"] == "text":
        change = "" if line["perplexity_change"] is None else f"{line['perplexity_change']:+.2%}"
        tails = "".join(f"{line[key]:>8.3f}" for key in ("kl_p95", "kl_p99", "kl_max"))
        return (
            f"{name:<34}{line['live_tokens']:>6.0f}{line['realised_cr']:>7.2f}{line['nominal_cr']:>9.2f}{line['kl_mean']:>9.4f}"
            f"{_range(line, 'kl_mean', 4):>17}{tails}{line['perplexity']:>8.2f}{change:>9}{line['top1_agreement']:>8.1%}"
        )
    if line["task"] == "greedy":
        return (
            f"{name:<40}{line['live_tokens']:>6.0f}{line['realised_cr']:>7.2f}{line['match']:>8.1%}{_range(line, 'match', 3):>17}"
            f"{line['median_divergence']:>22.0f}"
        )
    logprob = "-" if line["answer_logprob"] is None else f"{line['answer_logprob']:.2f}"
    return (
        f"{name:<34}{line['live_tokens']:>6.0f}{line['realised_cr']:>7.2f}{line['score']:>8.1%}{_range(line, 'score', 3):>17}{logprob:>15}"
        f"{line['kv_reads']:>10.0f}{line['peak_live']:>10.0f}" + _chains(line)
    )


def _chains(line: dict) -> str:
    """Of several chains a problem: their vote, and pass@k."""
    if "chains" not in line:
        return ""
    return f"  vote {line['vote']:.1%}, " + ", ".join(
        f"{key} {value:.1%}" for key, value in line.items() if key.startswith("pass@")
    )


def _interval(name: str, interval: Interval) -> dict:
    return {name: interval.value, f"{name}_low": _number(interval.low), f"{name}_high": _number(interval.high)}


def _range(line: dict, name: str, digits: int) -> str:
    low, high = line[f"{name}_low"], line[f"{name}_high"]
    return "" if low is None else f"{low:.{digits}f}-{high:.{digits}f}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
