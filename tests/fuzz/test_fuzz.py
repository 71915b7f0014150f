"""Damaged inputs of every kind that the commands read.

Type `python -m pytest tests/fuzz -s` for a table of the outcomes, and add `-m slow` for the remaining seeds. To run one
case again, type `python -m pytest "tests/fuzz/test_fuzz.py::test_damaged_input_is_refused_or_read_right[model
weights-17]"`.
"""

import time
from collections import defaultdict

import pytest
from fuzz.fuzz_case import run_case, tally
from fuzz.targets import TARGETS

QUICK = 12  # seeds per target in the default suite


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folder with the undamaged input of a target, which is written once."""
    made = {}

    def folder(target):
        if target.name not in made:
            made[target.name] = tmp_path_factory.mktemp("good") / "input"
            made[target.name].mkdir()
            target.make(made[target.name])
        return made[target.name]

    return folder


@pytest.fixture(scope="module")
def outcomes():
    found, start = defaultdict(list), time.time()
    yield found
    print(f"\n{tally(found)}\n\n{time.time() - start:.0f} seconds")


@pytest.mark.parametrize(
    "target, seed",
    [
        pytest.param(target, seed, id=f"{target.name}-{seed}", marks=[] if seed < QUICK else pytest.mark.slow)
        for target in TARGETS
        for seed in range(target.count)
    ],
)
def test_damaged_input_is_refused_or_read_right(target, seed, good, outcomes, tmp_path):
    outcome, _ = run_case(target, seed, good(target), tmp_path / "input")
    outcomes[target.name].append(outcome)
