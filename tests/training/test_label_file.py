"""The pairs that a label pass keeps: which they are, on which mesh, on disk, and when the disk has no room."""

import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from cases import tiny_model, tokens
from train_runs import arguments, main, run_settings

from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.models.layers import unit_rms
from dms_jax.sharding import make_mesh
from dms_jax.training import fisher_init, label_file
from dms_jax.training.fisher_init import LabeledPairs, add_labels, gate_information, labeled_pairs, no_labels
from dms_jax.training.label_file import LabelFile, label_file_bytes


@pytest.fixture
def settings(tmp_path):
    found = run_settings(tmp_path) | {"init": "fisher", "label_rows": 12, "dms.decision_shift": 0, "length": 64}
    return found | {"dms.target_cr": 2, "steps": 0}


@pytest.mark.parametrize("mesh", [pytest.param("8x1", marks=pytest.mark.slow), "2x2x2"])
def test_pairs_do_not_depend_on_the_mesh(rng, mesh):
    dms = DMSConfig(window_size=6, decision_shift=0)
    model, rows = tiny_model(dms, num_layers=2), tokens(rng, 8, 64)
    segments, examples = np.zeros((8, 64), np.int32), np.arange(8, dtype=np.int32)
    add = lambda: jax.jit(lambda sums: add_labels(sums, model, rows, segments, examples, 0)[1])(no_labels(model.config))
    alone, measured = add(), jax.jit(lambda: gate_information(model, rows, segments, examples, 0))()
    with jax.set_mesh(make_mesh(*map(int, mesh.split("x")))):
        sharded = add()
    # fp16 has 11 bits, of which rounding flips the last one.
    for name, one, other, tolerance in zip(LabeledPairs._fields, alone, sharded, (1e-3, 1e-4, 0), strict=True):
        scale = float(np.abs(np.asarray(one, np.float64)).max())
        np.testing.assert_allclose(other, one, rtol=tolerance, atol=0.1 * tolerance * scale, err_msg=name)
    values, stream = measured
    count = 64 - 6 - fisher_init.MIN_QUERIES  # those that enough queries could miss
    features = unit_rms(stream, model.config.rms_norm_eps)[:, :, :count]
    np.testing.assert_allclose(alone.features, features, atol=2e-3)
    missing = 64 - 1 - 6 - np.arange(count)
    np.testing.assert_allclose(alone.labels, np.asarray(values)[..., :count] / missing, rtol=1e-4, atol=1e-9)
    assert (alone.weight[:, 0] == fisher_init.SINK_WEIGHT).all() and (alone.weight[:, 1:] == 1).all()


@pytest.mark.parametrize("shift", [0, 1])
def test_pairs_of_long_rows_are_drawn_and_stand_for_all(rng, monkeypatch, shift):
    """Each kept pair has the features of its deciding token; starts of documents stay, the others weigh more."""
    monkeypatch.setattr(fisher_init, "MAX_PAIRS", 20)
    length, config = 200, tiny_model(DMSConfig(window_size=6, decision_shift=shift), num_layers=2).config
    segments = np.repeat([[0] * 100 + [1] * 90 + [-1] * 10], 3, axis=0).astype(np.int32)
    stream = rng.normal(size=(2, 3, length, 32)).astype(np.float32)
    values = rng.random((2, 3, 4, length)).astype(np.float32)
    examples = np.array([3, 4, 3], np.int32)
    found = labeled_pairs(config, values, stream, segments, examples, 0)
    missing = np.asarray(fisher_init.queries_outside(segments, 6))
    weight = np.asarray(fisher_init.label_weights(segments, np.asarray(missing), shift))
    assert found.features.shape == (2, 3, 20, 32) and found.labels.shape == (2, 3, 4, 20)
    np.testing.assert_allclose(found.weight.sum(1), weight.sum(1), rtol=1e-5)
    assert (np.sort(found.weight, axis=1)[:, -2:] == fisher_init.SINK_WEIGHT).all()
    u = np.asarray(unit_rms(stream, config.rms_norm_eps))
    for row in range(3):
        at = [np.abs(u[0, row] - feature).sum(-1).argmin() - shift for feature in np.asarray(found.features[0, row])]
        assert sorted(set(at)) == at and {0, 100} <= set(at) and (weight[row, at] > 0).all()
        np.testing.assert_allclose(found.features[1, row], u[1, row][np.array(at) + shift], atol=2e-3)
        np.testing.assert_allclose(found.labels[:, row], values[:, row][..., at] / missing[row, at], rtol=1e-5)
    other = labeled_pairs(config, values[:, ::-1], stream[:, ::-1], segments, examples[::-1], 0)
    np.testing.assert_array_equal(other.features[:, 1], found.features[:, 1])
    np.testing.assert_array_equal(found.weight[0], found.weight[2])
    another = labeled_pairs(config, values[:, :1], stream[:, :1], segments[:1], examples[1:2], 0)
    assert not np.array_equal(another.features[:, 0], found.features[:, 0])


def test_file_gives_back_the_pairs_that_count(rng, tmp_path):
    """Pairs without a weight are left out."""
    config = tiny_model(DMSConfig(window_size=6), num_layers=2).config
    rows, count = 3, 60 - 6 - 32
    features = rng.normal(size=(2, rows, count, 32)).astype(np.float16)
    labels = rng.random((2, rows, 4, count)).astype(np.float32)
    weight = (rng.random((rows, count)) < 0.5).astype(np.float32)
    file = LabelFile(tmp_path, config, rows, 60)
    file.write(0, LabeledPairs(features[:, :1], labels[:, :1], weight[:1]))
    file.write(1, LabeledPairs(features[:, 1:], labels[:, 1:], weight[1:]))
    file.flush()
    assert file.num_rows == rows and file.path.stat().st_size == label_file_bytes(config, rows, 60)
    assert label_file_bytes(config, rows, 60) == rows * 2 * count * (2 * 32 + 4 * 4 + 4)
    found = file.read(1, 1, 3)
    at = [(row, t) for row in (1, 2) for t in range(count) if weight[row, t]]
    np.testing.assert_array_equal(found.features, [features[1, row, t] for row, t in at])
    np.testing.assert_array_equal(found.labels, [labels[1, row, :, t] for row, t in at])
    assert (found.weight == 1).all()
    file.close()


def test_disk_that_is_too_small_is_refused_before_the_labels(settings, monkeypatch):
    usage = SimpleNamespace(total=2**30, used=2**30, free=1000)
    monkeypatch.setattr(label_file, "shutil", SimpleNamespace(disk_usage=lambda folder: usage))
    with pytest.raises(ConfigError, match=r"12 label rows need .* GiB .*fewer label_rows") as refusal:
        main(arguments(settings))
    assert "\n" not in str(refusal.value)
    assert shutil.disk_usage(settings["output"]).free > 1000


def test_write_that_fails_is_one_line(settings, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(label_file.os, "fsync", full)
    with pytest.raises(ConfigError, match=r"No space left on device.*--resume") as refusal:
        main(arguments(settings))
    assert "\n" not in str(refusal.value)
