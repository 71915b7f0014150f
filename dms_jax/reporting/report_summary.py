"""The measurements in a few sentences, whatever they say: also where DMS is behind."""

import math
from collections.abc import Sequence

import numpy as np

from dms_jax.evaluation.aggregate import AnswerArm, GreedyArm, KeptArm, TextArm, TextGroup
from dms_jax.evaluation.statistics import Interval, bootstrap_mean

LEARNED = ("dms", "immediate_eviction")  # names in results files of policies that need a retrofitted model
ROUNDING = 1e-5  # a KL below this is rounding error
COMPARABLE = 0.1  # arms are of equal size if their live tokens differ by at most this fraction
NO_RIVAL = "; no training-free method was measured at that size."


def summary(
    texts: list[TextGroup], answers: list[AnswerArm], greedy: list[GreedyArm], kept: list[KeptArm]
) -> list[str]:
    """The sentences at the top of the page."""
    domains = dict.fromkeys(group.domain for group in texts)
    sentences = [_text_sentence(_headline(texts, domain), is_brief=n > 0) for n, domain in enumerate(domains)]
    sentences += [_answer_sentence(answers), _greedy_sentence(greedy)]
    for arm in kept if not texts else ():
        live = f"{arm.length / arm.realised_cr:.0f} of {arm.length} tokens per head"
        sentences.append(f"On {arm.domain}, {arm.name} keeps {live} at the end (CR {arm.realised_cr:.2f}).")
    return [sentence for sentence in sentences if sentence]


def digits(value: float, count: int = 3) -> str:
    """`count` significant digits without an exponent; "–" for nan, which stands for "not measured", and 0 for rounding error."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    if abs(value) < ROUNDING:
        return "0"
    places = max(0, count - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(places, 8)}f}"


def spread(interval: Interval, percent: bool = False) -> str:
    """The interval in brackets; "" where it has no width, because there is one unit or all units are alike."""
    if math.isnan(interval.low) or interval.high - interval.low < ROUNDING:
        return ""
    ends = (f"{100 * end:.1f}" if percent else digits(end) for end in (interval.low, interval.high))
    return f"[{', '.join(ends)}]"


def is_training_free(policy: str) -> bool:
    return policy not in (*LEARNED, "dense")


def gap_sentence(group: TextGroup) -> str:
    """How much nearer to dense DMS is than the best training-free arm of its size, paired by rows; "" without such an arm."""
    dms, rivals = _smallest_dms(group.arms), _rivals(group)
    if dms is None or not rivals:
        return ""
    best = rivals[0]
    gaps = [best.kl_rows[unit].mean() - dms.kl_rows[unit].mean() for unit in dms.kl_rows if unit in best.kl_rows]
    if not gaps:
        return ""
    gap = bootstrap_mean(gaps)
    direction = "farther from"
    if gap.value < 0:
        gap, direction = Interval(-gap.value, -gap.high, -gap.low, gap.units), "nearer to"
    size = " ".join(filter(None, (digits(gap.value), spread(gap))))
    return f"{best.name} is {size} nats {direction} dense than {dms.name} (mean KL, difference paired by rows)."


def _headline(groups: list[TextGroup], domain: str) -> TextGroup:
    """The smallest budget of a domain at which DMS meets a rival, else the smallest with DMS, else the smallest."""
    own = [group for group in groups if group.domain == domain]
    return min(own, key=lambda group: (not _rivals(group), not _smallest_dms(group.arms), group.budget or math.inf))


def _smallest_dms(arms):
    return min((arm for arm in arms if arm.policy == "dms"), key=lambda arm: arm.live_tokens, default=None)


def _rivals(group: TextGroup) -> list[TextArm]:
    """The training-free arms of DMS's size, the nearest to dense first."""
    dms = _smallest_dms(group.arms)
    return [
        arm
        for arm in group.arms
        if dms and is_training_free(arm.policy) and _is_comparable(arm.live_tokens, dms.live_tokens)
    ]


def _is_comparable(live_tokens: float, dms_live_tokens: float) -> bool:
    return abs(live_tokens - dms_live_tokens) <= COMPARABLE * dms_live_tokens


def _text_sentence(group: TextGroup, is_brief: bool) -> str:
    """`is_brief`: an earlier sentence explained the terms."""
    dms, rivals = _smallest_dms(group.arms), _rivals(group)
    if dms is None:
        best = next((arm for arm in group.arms if arm.policy != "dense"), None)
        if best is None:
            return ""
        return f"At {_size(best, group)}, {best.name} stays nearest to the dense model on {group.domain}: {_distance(best)}."
    if is_brief and rivals:
        size = f"at {dms.live_tokens:.0f} live tokens (CR {dms.realised_cr:.1f})"
        return f"On {group.domain}, {size}: DMS {_distance(dms)}, {rivals[0].policy} {_distance(rivals[0])}."
    text = f"At {_size(dms, group)}, DMS has a mean KL of {_distance(dms)} to the dense model on {group.domain}"
    if not rivals:
        return text + NO_RIVAL
    text += f"; the best training-free method of that size, {rivals[0].policy}, has {_distance(rivals[0])}"
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


def _answer_sentence(arms: list[AnswerArm]) -> str:
    """Accuracy over the tasks on which DMS was measured: DMS, dense, and the best training-free arm of DMS's size that has all of them."""
    tasks = list(dict.fromkeys(arm.task for arm in arms if arm.policy == "dms"))
    by_name: dict[str, list[AnswerArm]] = {}
    for arm in arms:
        if arm.task in tasks:
            by_name.setdefault(arm.name, []).append(arm)
    complete = {name: arms for name, arms in by_name.items() if len(arms) == len(tasks)}
    dms = min((arms for arms in complete.values() if arms[0].policy == "dms"), key=_live, default=None)
    if dms is None:
        return ""
    names = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks ({', '.join(tasks)})"
    text = f"On {names}, {dms[0].name} scores {_accuracy(dms):.0%} with {_live(dms):.0f} live tokens on average"
    if dense := complete.get("dense"):
        text += f"; dense scores {_accuracy(dense):.0%} with {_live(dense):.0f}"
    free = [
        arms
        for arms in complete.values()
        if is_training_free(arms[0].policy) and _is_comparable(_live(arms), _live(dms))
    ]
    if not free:
        return text + NO_RIVAL
    best = max(free, key=_accuracy)
    return f"{text}; the best training-free method of that size, {best[0].name}, scores {_accuracy(best):.0%}."


def _greedy_sentence(arms: list[GreedyArm]) -> str:
    arm = _smallest_dms(arms)
    if arm is None:
        return ""
    return f"{arm.name} continues {arm.domain} greedily for {arm.tokens:.0f} tokens, of which {arm.match.value:.0%} equal the dense model's."


def _live(arms: Sequence[AnswerArm]) -> float:
    return float(np.mean([arm.live_tokens for arm in arms]))


def _accuracy(arms: Sequence[AnswerArm]) -> float:
    return float(np.mean([arm.accuracy.value for arm in arms]))
