"""Several samples of one problem: majority vote and pass@k."""

from collections import Counter
from collections.abc import Sequence
from math import comb

from dms_jax.errors import ConfigError


def majority_vote(answers: Sequence[str]) -> int:
    """The index of the first sample with the most frequent answer (self-consistency, Wang et al., arXiv:2203.11171).

    Ties go to the answer that came first. "" is no answer and does not vote unless nobody does.
    """
    if not answers:
        raise ValueError("nobody votes: give at least one answer")
    votes = Counter(answer for answer in answers if answer) or Counter(answers)
    return answers.index(
        max(votes, key=votes.__getitem__)
    )  # max takes the first of equals, and a Counter keeps the order


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that of k samples drawn from these without replacement at least one is right.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al., arXiv:2107.03374. Raises ConfigError.
    """
    if not 1 <= k <= num_samples:
        raise ConfigError(
            f"pass@{k} needs {k} samples of each problem or more, got {num_samples}; draw more, or lower k to at least 1"
        )
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"{num_right} of {num_samples} samples cannot be right")
    return 1 - comb(num_samples - num_right, k) / comb(num_samples, k)
