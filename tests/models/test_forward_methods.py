"""The forward methods as a notebook calls them: compiled once for a shape, and refusing what are no rows of ids."""

import jax
import numpy as np
import pytest
from cases import tiny_model, tokens

from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.models.compiled_method import _run_compiled
from dms_jax.models.parameters import jitted

LOCAL = DMSConfig(window_size=4)


def test_methods_compile_once_for_a_shape_and_give_the_numbers_of_the_compiled_program(rng):
    model, rows = tiny_model(LOCAL), tokens(rng, 2, 12)
    log_keep = np.zeros((3, 2, 4, 12), np.float32)
    calls = {
        "dense": (rows,),
        "hard": (rows, None, 0.5),
        "relaxed": (rows, log_keep),
        "marked_hidden": (rows, np.arange(12) % 3 == 0, 4),
        "budgeted_hidden": (rows, np.full((3, 4), 8, np.int32)),
    }
    for name, args in calls.items():
        out = getattr(model, name)(*args)
        before = _run_compiled._cache_size()
        again = getattr(model, name)(*((rows + 1) % 97, *args[1:]))
        assert _run_compiled._cache_size() == before, name
        assert not np.array_equal(jax.tree.leaves(out)[0], jax.tree.leaves(again)[0])
        if name != "marked_hidden":  # its window is static
            for ours, theirs in zip(*map(jax.tree.leaves, (out, jitted(model, name)(*args))), strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_method_is_a_part_of_the_program_that_calls_it(rng):
    model, rows = tiny_model(LOCAL), tokens(rng, 1, 6)
    before = _run_compiled._cache_size()
    jitted(model, "hard")(rows)
    assert _run_compiled._cache_size() == before


@pytest.mark.parametrize("method", ["dense", "hard", "hard_hidden", "dense_hidden"])
@pytest.mark.parametrize(
    "wrong, words",
    [
        (np.arange(5), r"\[5\].*tokens\[None\]"),
        ("hello", "load_tokenizer"),
        ([[1, 2], [3]], "array of token ids"),
        (np.ones((1, 2, 3), int), r"\[1, 2, 3\]"),
        (np.array([[0.5, 1.0]]), "whole numbers, got 0.5"),
        (np.array([[True, False]]), "whole numbers"),
        (np.array([[1, 97]]), "97 is outside the vocabulary"),
    ],
)
def test_tokens_that_are_no_rows_of_ids_are_refused_in_one_line(method, wrong, words):
    with pytest.raises(ConfigError, match=words) as caught:
        getattr(tiny_model(LOCAL), method)(wrong)
    assert "\n" not in str(caught.value)
