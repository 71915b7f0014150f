"""Summarize the measurements in a few sentences, which say the same whether DMS is ahead or behind."""

import math
from collections.abc import Sequence

import numpy as np

from dms_jax.evaluation.aggregate import (
    AnswerResult,
    GreedyResult,
    RetentionResult,
    TextGroup,
    TextResult,
    grouped,
)
from dms_jax.evaluation.statistics import Interval, bootstrap_mean

LEARNED = (
    "dms",
    "dms_budget",
    "immediate_eviction",
)  # the policies that need a retrofitted model, as results files name them
ROUNDING = 1e-5  # a KL below this is rounding error
COMPARABLE = 0.1  # results are of equal size if their live tokens differ by at most this fraction
NO_RIVAL = "; no training-free method was measured at that size."


def summary(
    texts: list[TextGroup], answers: list[AnswerResult], greedy: list[GreedyResult], kept: list[RetentionResult]
) -> list[str]:
    """Return the sentences at the top of the page."""
    domains = dict.fromkeys(group.domain for group in texts)
    sentences = [_text_sentence(_headline(texts, domain), is_brief=n > 0) for n, domain in enumerate(domains)]
    sentences += [_answer_sentence(answers), _greedy_sentence(greedy)]
    for result in kept if not texts else ():
        live = f"{result.length / result.realised_cr:.0f} of {result.length} tokens per head"
        sentences.append(f"On {result.domain}, {result.name} keeps {live} at the end (CR {result.realised_cr:.2f}).")
    return [sentence for sentence in sentences if sentence]


def digits(value: float, count: int = 3) -> str:
    """Format a number with `count` significant digits and no exponent. A nan, which means "not measured", becomes "–",
    and a rounding error becomes 0."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    if abs(value) < ROUNDING:
        return "0"
    places = max(0, count - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(places, 8)}f}"


def spread(interval: Interval, percent: bool = False) -> str:
    """Format an interval in brackets; "" if it has no width, because there is one unit or all units are equal."""
    if math.isnan(interval.low) or interval.high - interval.low < ROUNDING:
        return ""
    ends = (f"{100 * end:.1f}" if percent else digits(end) for end in (interval.low, interval.high))
    return f"[{', '.join(ends)}]"


def gap_sentence(group: TextGroup) -> str:
    """Compare the mean KL of DMS with that of the best training-free method of its size, paired by rows; "" if there is
    none."""
    dms, rivals = _smallest_dms(group.results), _rivals(group)
    if dms is None or not rivals:
        return ""
    best = rivals[0]
    gaps = [best.kl_rows[unit].mean() - dms.kl_rows[unit].mean() for unit in dms.kl_rows if unit in best.kl_rows]
    if not gaps:
        return ""
    gap, direction = bootstrap_mean(gaps), "farther from"
    if gap.value < 0:
        gap, direction = Interval(-gap.value, -gap.high, -gap.low, gap.units), "nearer to"
    size = " ".join(filter(None, (digits(gap.value), spread(gap))))
    return f"{best.name} is {size} nats {direction} dense than {dms.name} (mean KL, difference paired by rows)."


def _headline(groups: list[TextGroup], domain: str) -> TextGroup:
    """Return the group of a domain with the smallest budget, preferably one that has DMS and a rival, or at least
    DMS."""
    own = [group for group in groups if group.domain == domain]
    return min(own, key=lambda group: (not _rivals(group), not _smallest_dms(group.results), group.budget or math.inf))


def _smallest_dms(results):
    own = [result for result in results if result.policy == "dms"]
    return min(own, key=lambda result: result.live_tokens, default=None)


def _rivals(group: TextGroup) -> list[TextResult]:
    """Return the training-free results of the size of DMS, the nearest to dense first."""
    dms = _smallest_dms(group.results)
    return [r for r in group.results if dms and _is_rival(r.policy, r.live_tokens, dms.live_tokens)]


def _is_rival(policy: str, live_tokens: float, dms_live_tokens: float) -> bool:
    is_training_free = policy not in (*LEARNED, "dense")
    return is_training_free and abs(live_tokens - dms_live_tokens) <= COMPARABLE * dms_live_tokens


def _text_sentence(group: TextGroup, is_brief: bool) -> str:
    """Compare DMS with its best rival. A brief sentence follows one that has explained the terms."""
    dms, rivals = _smallest_dms(group.results), _rivals(group)
    if dms is None:
        best = next((result for result in group.results if result.policy != "dense"), None)
        if best is None:
            return ""
        return (
            f"At {_size(best, group)}, {best.name} stays nearest to the dense model on {group.domain}: "
            f"{_distance(best)}."
        )
    if is_brief and rivals:
        size = f"at {dms.live_tokens:.0f} live tokens (CR {dms.realised_cr:.1f})"
        return f"On {group.domain}, {size}: DMS {_distance(dms)}, {rivals[0].policy} {_distance(rivals[0])}."
    text = f"At {_size(dms, group)}, DMS has a mean KL of {_distance(dms)} to the dense model on {group.domain}"
    if not rivals:
        return text + NO_RIVAL
    text += f"; the best training-free method of that size, {rivals[0].policy}, has {_distance(rivals[0])}"
    if not (rivals[0].kl.value > 0 and dms.kl.value > 0):
        return f"{text}."
    ratio = rivals[0].kl.value / dms.kl.value
    return f"{text}: DMS is " + (f"{ratio:.1f} times nearer." if ratio >= 1 else f"{1 / ratio:.1f} times farther away.")


def _size(result: TextResult, group: TextGroup) -> str:
    return f"{result.live_tokens:.0f} live tokens of {group.length} (CR {result.realised_cr:.1f})"


def _distance(result: TextResult) -> str:
    change = "" if math.isnan(result.perplexity_change) else f" (perplexity {result.perplexity_change:+.1%})"
    return f"{digits(result.kl.value)} nats{change}"


def _answer_sentence(results: list[AnswerResult]) -> str:
    """Compare the mean accuracy of DMS, dense and the best rival, on the tasks on which DMS was measured. Methods that
    were not measured on all of these tasks are left out."""
    tasks = list(dict.fromkeys(result.task for result in results if result.policy == "dms"))
    by_name = grouped([result for result in results if result.task in tasks], lambda result: result.name)
    complete = {name: found for name, found in by_name.items() if len(found) == len(tasks)}
    dms = min((found for found in complete.values() if found[0].policy == "dms"), key=_live, default=None)
    if dms is None:
        return ""
    names = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks ({', '.join(tasks)})"
    text = f"On {names}, {dms[0].name} scores {_accuracy(dms):.0%} with {_live(dms):.0f} live tokens on average"
    if dense := complete.get("dense"):
        text += f"; dense scores {_accuracy(dense):.0%} with {_live(dense):.0f}"
    rivals = [found for found in complete.values() if _is_rival(found[0].policy, _live(found), _live(dms))]
    if not rivals:
        return text + NO_RIVAL
    best = max(rivals, key=_accuracy)
    return f"{text}; the best training-free method of that size, {best[0].name}, scores {_accuracy(best):.0%}."


def _greedy_sentence(results: list[GreedyResult]) -> str:
    result = _smallest_dms(results)
    if result is None:
        return ""
    text = f"{result.name} continues {result.domain} greedily for {result.tokens:.0f} tokens, of which "
    return f"{text}{result.match.value:.0%} equal the dense model's."


def _live(results: Sequence[AnswerResult]) -> float:
    return float(np.mean([result.live_tokens for result in results]))


def _accuracy(results: Sequence[AnswerResult]) -> float:
    return float(np.mean([result.accuracy.value for result in results]))
