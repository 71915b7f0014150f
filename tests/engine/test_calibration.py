"""Calibration: its threshold makes a cache reach the target ratio, and impossible targets are refused."""

import numpy as np
import pytest
from cases import tiny_model, tokens

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError


def test_calibrated_threshold_reaches_the_target_ratio(rng):
    model, ids = tiny_model(DMSConfig(window_size=4, evict_logit_bias=0.0), 3, num_layers=2), tokens(rng, 4, 80)
    thresholds = []
    for target in (1.5, 3.0, 8.0):
        threshold = dms_jax.calibrate(model, ids, target, tolerance=0.02)
        _, cache = dms_jax.prefill(model, dms_jax.init_cache(model, 4, 80), ids, threshold=threshold)
        assert abs(dms_jax.compression_ratio(cache) / target - 1) <= 0.02
        thresholds.append(threshold)
    assert thresholds == sorted(thresholds, reverse=True)
    _, evict = model.hard(ids, threshold=thresholds[0])
    assert np.mean(evict) < np.mean(model.hard(ids, threshold=thresholds[2])[1])


def test_calibrate_refuses_impossible_targets_and_inputs(rng):
    model, ids = tiny_model(DMSConfig(window_size=19), 3, num_layers=1), tokens(rng, 1, 40)
    with pytest.raises(ConfigError, match="target_cr must be at most 2 .* got 2.5"):
        dms_jax.calibrate(model, ids, 2.5)
    with pytest.raises(ConfigError, match="target_cr .* 0.5"):
        dms_jax.calibrate(model, ids, 0.5)
    with pytest.raises(ConfigError, match="tokens .* .40."):
        dms_jax.calibrate(model, ids[0], 2.0)
    with pytest.raises(ConfigError, match="calibrate .*dms=DMSConfig"):
        dms_jax.calibrate(tiny_model(None, 3, num_layers=1), ids, 2.0)
