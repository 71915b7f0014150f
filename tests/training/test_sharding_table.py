"""A run has the same results on every mesh, in every mode and over several processes.

This also holds for numbers of KV heads that no mesh axis divides.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from retrofit_cases import DMS, config_of, outcome, retrofit, same_outcome
from train_runs import free_port

TESTS = Path(__file__).parent.parent
MODES = "adapter", "full", "borrowed"
MESHES = (8, 1), (4, 2), (2, 4), (2, 2, 2), (1, 2, 4), (4, 1, 2)
HEADS = {(9, 3): [(4, 2), (2, 4), (2, 2, 2)], (12, 3): [(4, 2), (2, 4), (1, 1, 8)]}  # (query heads, KV heads): meshes
CORE = {("adapter", (2, 4)), ("full", (2, 2, 2))}  # cases of the fast suite
CORE_HEADS = {((9, 3), (2, 2, 2))}


@functools.cache
def on_one_device(mode, heads=None):
    return outcome(retrofit((1, 1), config_of(mode), **fields(heads)))


def fields(heads):
    return {} if heads is None else {"num_q_heads": heads[0], "num_kv_heads": heads[1]}


def cases(table, core):
    return [pytest.param(*case, marks=[] if case in core else [pytest.mark.slow]) for case in table]


@pytest.mark.parametrize("mode, mesh", cases([(mode, mesh) for mode in MODES for mesh in MESHES], CORE))
def test_run_is_the_same_on_every_mesh(mode, mesh):
    same_outcome(outcome(retrofit(mesh, config_of(mode))), on_one_device(mode))


@pytest.mark.parametrize("mesh", [(8, 1), pytest.param((2, 2), marks=pytest.mark.slow), (2, 2, 2)])
def test_hidden_units_of_the_head_train_the_same_on_every_mesh(mesh):
    of = lambda sizes: outcome(retrofit(sizes, dms=dataclasses.replace(DMS, head_units=6)))
    found, alone = of(mesh), of((1, 1))
    same_outcome(found, alone)
    assert all(np.any(alone[f"gradient layers.attention.evict_units_{part}"] != 0) for part in ("in", "bias", "out"))


@pytest.mark.parametrize(
    "heads, mesh", cases([(heads, mesh) for heads, meshes in HEADS.items() for mesh in meshes], CORE_HEADS)
)
def test_kv_heads_that_the_devices_do_not_divide_change_nothing(heads, mesh):
    same_outcome(outcome(retrofit(mesh, config_of("adapter"), **fields(heads))), on_one_device("adapter", heads))


@pytest.mark.parametrize(
    "mode, mesh",
    [pytest.param("adapter", "1x2x4", id="context across processes")]
    + [
        pytest.param(mode, mesh, marks=pytest.mark.slow)
        for mode in MODES
        for mesh in ("8x1", "2x2x2", "1x8")
        if (mode, mesh) != ("adapter", "1x2x4")
    ],
)
def test_two_processes_of_four_devices_equal_one_device(mode, mesh, tmp_path):
    address = f"localhost:{free_port()}"
    command = [sys.executable, str(TESTS / "retrofit_worker.py"), address, "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    both = [
        subprocess.Popen(
            [*command, str(i), "4", mesh, mode, str(tmp_path / "found.npz")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=400)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    same_outcome(dict(np.load(tmp_path / "found.npz")), on_one_device(mode))
