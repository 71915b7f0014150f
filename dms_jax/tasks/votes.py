"""Score several samples of one problem: majority vote and pass@k."""

from collections import Counter
from collections.abc import Sequence
from math import comb

from dms_jax.errors import ConfigError


def majority_vote(answers: Sequence[str]) -> int:
    """Return the index of the first sample with the most frequent answer (self-consistency, Wang et al.,
    arXiv:2203.11171).

    Ties go to the answer that came first. "" stands for no answer, which wins only if no sample has one.
    """
    if not answers:
        raise ValueError("majority_vote needs at least one answer")
    votes = Counter(answer for answer in answers if answer) or Counter(answers)
    return answers.index(max(votes, key=votes.__getitem__))  # the first of equals, since a Counter keeps the order


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that at least one of k samples, drawn without replacement, is right.

    It is the unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al., arXiv:2107.03374. Raises ConfigError unless
    1 <= k <= n.
    """
    if not 1 <= k <= num_samples:
        raise ConfigError(
            f"pass@{k}: k must be from 1 to the number of samples per problem, {num_samples}; draw more samples"
        )
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"num_right must be from 0 to {num_samples}, got {num_right}")
    return 1 - comb(num_samples - num_right, k) / comb(num_samples, k)
