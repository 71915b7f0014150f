"""The rule of visibility against the NumPy oracle and golden cases."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import decode, visible
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_jax.core.eviction import align_to_pairs, live_counts
from dms_jax.core.visibility import NEVER, expiry_of, is_outside_window, is_visible

G1 = [0, 1, 1, 0, 1, 0, 1, 1]


def ours(alpha, window, shift):
    """Return which query sees which pair [T, T] by the rule of the package."""
    position = jnp.arange(len(alpha))
    marked = align_to_pairs(jnp.asarray(alpha, bool)[None, None], shift, False)[0, 0]
    return np.asarray(is_visible(position, position, expiry_of(marked, position, window)))


def test_visible_pairs_of_the_golden_case_with_shift():
    seen = [np.flatnonzero(row).tolist() for row in ours(G1, 2, 1)]
    assert seen == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4, 5], [2, 4, 5, 6], [2, 4, 5, 6, 7]]


def test_visible_pairs_of_the_golden_case_without_shift():
    seen = ours(G1, 2, 0)
    assert seen.sum(1).tolist() == [1, 2, 3, 4, 4, 4, 5, 5] and np.flatnonzero(seen[7]).tolist() == [0, 3, 5, 6, 7]


@pytest.mark.parametrize(
    "alpha, window, shift, live",
    [
        ([1] * 10, 3, 1, [1, 2, 3] + [4] * 7),  # a sliding window of w + 1
        ([0] * 10, 3, 1, list(range(1, 11))),
        (G1, 7, 1, list(range(1, 9))),  # w >= T - 1: dense, whatever the decisions
        ([1] + [0] * 7, 2, 1, list(range(1, 9))),  # token 0 decides about no pair
        ([1] * 6, 0, 1, [1] * 6),  # w = 0: each query sees itself
    ],
)
def test_live_counts_of_golden_cases(alpha, window, shift, live):
    assert ours(alpha, window, shift).sum(1).tolist() == live


def test_one_mark_hides_one_pair():
    alpha = [0, 0, 0, 0, 0, 1, 0, 0, 0]
    changed = np.argwhere(ours([0] * 9, 2, 1) & ~ours(alpha, 2, 1))
    assert changed.tolist() == [[7, 4], [8, 4]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=40), st.integers(0, 45), st.integers(0, 1))
def test_rule_equals_mask_and_slot_reuse(alpha, window, shift):
    alpha = np.array(alpha)
    seen, live = decode(alpha, window, shift)
    np.testing.assert_array_equal(ours(alpha, window, shift), visible(alpha, window, shift))
    np.testing.assert_array_equal(seen, visible(alpha, window, shift))
    assert int(live_counts(jnp.asarray(alpha, bool)[None], window, shift)[0]) == live[-1]


def test_gate_acts_exactly_where_a_marked_pair_is_gone():
    position = jnp.arange(12)
    gone = ~is_visible(position, position, expiry_of(jnp.ones(12, bool), position, 4)) & (
        position[:, None] >= position[None]
    )
    np.testing.assert_array_equal(is_outside_window(position[:, None], position[None, :], 4), gone)
    assert int(expiry_of(jnp.zeros(1, bool), jnp.arange(1), 4)[0]) == NEVER
