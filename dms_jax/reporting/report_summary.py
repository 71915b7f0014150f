"""The measurements in a few sentences, as they fell: also where DMS is behind."""

import math

import numpy as np

from dms_jax.evaluation.aggregate import AnswerArm, GreedyArm, KeptArm, TextArm, TextGroup
from dms_jax.evaluation.statistics import Interval, bootstrap_mean

LEARNED = ("dms", "immediate_eviction")  # names in results files of policies that need a retrofitted model
ROUNDING = 1e-5
COMPARABLE = 0.1  # arms whose live tokens differ by no more are of equal size


def summary(
    texts: list[TextGroup], answers: list[AnswerArm], greedy: list[GreedyArm], kept: list[KeptArm]
) -> list[str]:
    sentences = [_text_sentence(_hardest(texts, domain), brief) for domain, brief in _named_once(texts)]
    sentences += _answer_sentences(answers) + _greedy_sentences(greedy)
    if kept and not texts:
        sentences += [
            f"On {arm.domain}, {arm.name} holds {arm.length / arm.realised_cr:.0f} of {arm.length} tokens a head at the end "
            f"(CR {arm.realised_cr:.2f})."
            for arm in kept
        ]
    return [sentence for sentence in sentences if sentence]


def digits(value: float, count: int = 3) -> str:
    """`count` significant digits without an exponent, "–" for what was not measured; 0 for what is rounding in a KL."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    if abs(value) < ROUNDING:
        return "0"
    places = max(0, count - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(places, 8)}f}"


def spread(interval: Interval, percent: bool = False) -> str:
    """The interval in brackets; nothing where it says nothing: one unit, or all alike."""
    if math.isnan(interval.low) or interval.high - interval.low < ROUNDING:
        return ""
    return (
        f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
        if percent
        else f"[{digits(interval.low)}, {digits(interval.high)}]"
    )


def is_training_free(policy: str) -> bool:
    return policy not in (*LEARNED, "dense")


def gap_sentence(group: TextGroup) -> str:
    """How much nearer to dense DMS is than the best training-free arm of its size, row by row; "" without such an arm."""
    dms, rivals = _dms(group.arms), _rivals(group)
    if dms is None or not rivals:
        return ""
    best = rivals[0]
    gaps = [best.kl_rows[unit].mean() - dms.kl_rows[unit].mean() for unit in dms.kl_rows if unit in best.kl_rows]
    if not gaps:
        return ""
    gap = bootstrap_mean(gaps)
    if gap.value < 0:
        gap, more = Interval(-gap.value, -gap.high, -gap.low, gap.units), "nearer to"
    else:
        more = "farther from"
    return f"{best.name} is {digits(gap.value)} {spread(gap)} nats {more} dense than {dms.name} (mean KL, difference paired by rows).".replace(
        "  ", " "
    )


def _named_once(groups: list[TextGroup]) -> list[tuple[str, bool]]:
    """Domains, and whether the terms were explained by an earlier one."""
    return [(domain, index > 0) for index, domain in enumerate(dict.fromkeys(group.domain for group in groups))]


def _hardest(groups: list[TextGroup], domain: str) -> TextGroup:
    """The smallest budget at which DMS meets an arm of its size, else the smallest with DMS, else the smallest."""
    own = [group for group in groups if group.domain == domain]
    return min(own, key=lambda group: (not _rivals(group), _dms(group.arms) is None, group.budget or math.inf))


def _dms(arms):
    return min((arm for arm in arms if arm.policy == "dms"), key=lambda arm: arm.live_tokens, default=None)


def _rivals(group: TextGroup) -> list[TextArm]:
    """Training-free arms of DMS's size, the best first."""
    dms = _dms(group.arms)
    return [arm for arm in group.arms if dms and is_training_free(arm.policy) and _equal_size(arm, dms)]


def _equal_size(arm, dms) -> bool:
    return abs(arm.live_tokens - dms.live_tokens) <= COMPARABLE * dms.live_tokens


def _text_sentence(group: TextGroup, brief: bool) -> str:
    dms, rivals = _dms(group.arms), _rivals(group)
    if dms is None:
        best = next((arm for arm in group.arms if arm.policy != "dense"), None)
        return (
            f"At {_size(best, group)}, {best.name} stays nearest to the dense model on {group.domain}: {_distance(best)}."
            if best
            else ""
        )
    if brief and rivals:
        size = f"at {dms.live_tokens:.0f} (CR {dms.realised_cr:.1f})"
        return f"On {group.domain}, {size}: DMS {_distance(dms)}, {rivals[0].policy} {_distance(rivals[0])}."
    text = (
        f"At {_size(dms, group)}, DMS stays within a mean KL of {_distance(dms)} of the dense model on {group.domain}"
    )
    if not rivals:
        return text + "; no training-free method was measured at that size."
    text += f"; the best training-free method of that size, {rivals[0].policy}, {_distance(rivals[0])}"
    if not (rivals[0].kl.value > 0 and dms.kl.value > 0):
        return text + "."
    ratio = rivals[0].kl.value / dms.kl.value
    return text + (
        f": DMS is {ratio:.1f} times nearer." if ratio >= 1 else f": DMS is {1 / ratio:.1f} times farther away."
    )


def _size(arm: TextArm, group: TextGroup) -> str:
    return f"{arm.live_tokens:.0f} live tokens of {group.length} (CR {arm.realised_cr:.1f})"


def _distance(arm: TextArm) -> str:
    change = "" if math.isnan(arm.perplexity_change) else f" (perplexity {arm.perplexity_change:+.1%})"
    return f"{digits(arm.kl.value)} nats{change}"


def _answer_sentences(arms: list[AnswerArm]) -> list[str]:
    """Over the tasks that have DMS: its accuracy, dense's, and that of the best training-free arm of its size in all of them."""
    tasks = list(dict.fromkeys(arm.task for arm in arms if arm.policy == "dms"))
    found: dict[str, list[AnswerArm]] = {}
    for arm in arms:
        if arm.task in tasks:
            found.setdefault(arm.name, []).append(arm)
    whole = {name: arms for name, arms in found.items() if len(arms) == len(tasks)}
    dms = min((arms for arms in whole.values() if arms[0].policy == "dms"), key=_live, default=None)
    if dms is None:
        return []
    names = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks ({', '.join(tasks)})"
    text = f"On {names}, {dms[0].name} scores {_mean_accuracy(dms):.0%} with {_live(dms):.0f} live tokens on average"
    dense = whole.get("dense")
    text += f"; dense {_mean_accuracy(dense):.0%} with {_live(dense):.0f}" if dense else ""
    free = [
        arms
        for arms in whole.values()
        if is_training_free(arms[0].policy) and abs(_live(arms) / _live(dms) - 1) <= COMPARABLE
    ]
    if not free:
        return [text + "; no training-free method was measured at that size."]
    best = max(free, key=_mean_accuracy)
    return [text + f"; the best training-free method of that size, {best[0].name}, {_mean_accuracy(best):.0%}."]


def _greedy_sentences(arms: list[GreedyArm]) -> list[str]:
    return [
        f"Of {arm.tokens:.0f} tokens that {arm.name} continues {arm.domain} with, greedily, {arm.match.value:.0%} are those of the dense model."
        for arm in [min((arm for arm in arms if arm.policy == "dms"), key=lambda arm: arm.live_tokens, default=None)]
        if arm
    ]


def _live(arms: list[AnswerArm]) -> float:
    return float(np.mean([arm.live_tokens for arm in arms]))


def _mean_accuracy(arms: list[AnswerArm]) -> float:
    return float(np.mean([arm.accuracy.value for arm in arms]))
