"""Schedules against those of the released checkpoints."""

import numpy as np

from dms_jax.core.cr_schedule import borrowed_channel_scale, evict_fraction, target_cr


def test_target_cr_follows_the_released_schedule():
    # Model-Optimizer goes from 1 to 16 in 510 steps, so a checkpoint every 34 steps is one unit of CR.
    for unit in range(16):
        np.testing.assert_allclose(target_cr(34 * unit, 1.0, 16.0, 510), unit + 1, rtol=1e-6)
    assert float(target_cr(600, 1.0, 16.0, 510)) == 16.0
    assert evict_fraction(1.0) == 0.0 and evict_fraction(8.0) == 0.875


def test_ramp_is_linear_and_ends_at_zero():
    np.testing.assert_allclose([borrowed_channel_scale(s, 4) for s in range(6)], [1, 0.75, 0.5, 0.25, 0, 0])
