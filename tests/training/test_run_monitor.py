"""Each alarm is raised once and gives advice; a loss spike names its batch."""

import json

import numpy as np
import pytest

from dms_jax.config import DMSConfig
from dms_jax.training.run_monitor import MIN_LOSSES, STUCK_STEPS, RunMonitor, target_advice

CALM = {"loss/total": 1.0, "cache/evict_fraction": 0.5, "cache/target_cr": 2.0, "cache/nominal_cr": 2.0}
HEADS = np.full((3, 2), 0.5)


def check(monitor, step=0, heads=HEADS, gates=True, **changes):
    metrics = CALM | {key.replace("__", "/"): value for key, value in changes.items()}
    return monitor.check(step, metrics, heads, (8 * step, 8 * step + 7), gates)


@pytest.mark.parametrize(
    ("alarm", "phrase", "changes"),
    [
        (
            "keeps",
            "nothing is evicted although the target is 50%",
            {"cache__evict_fraction": 0.0, "cache__nominal_cr": 1.0},
        ),
        ("evicts", "everything outside the window is evicted", {"cache__evict_fraction": 0.995}),
        ("overshoots", "over twice its target", {"cache__nominal_cr": 4.5, "cache__evict_fraction": 0.78}),
    ],
)
def test_collapse_is_reported_once_with_advice(alarm, phrase, changes, capsys):
    monitor = RunMonitor()
    assert check(monitor) == [] and check(monitor, gates=False, **changes) == []
    assert {"watch/alarm": alarm} in check(monitor, 3, **changes)
    assert check(monitor, 4, **changes) == []
    err = capsys.readouterr().err
    assert err.count(phrase) == 1 and "step 3" in err and "optimizer.learning_rate" in err


@pytest.mark.parametrize(
    ("value", "alarm", "phrase"), [(0.0, "head_keeps", "evict nothing"), (1.0, "head_evicts", "evict everything")]
)
def test_stuck_head_is_named(value, alarm, phrase, capsys):
    monitor, heads = RunMonitor(), HEADS.copy()
    heads[1, 1] = value
    events = [check(monitor, step, heads) for step in range(STUCK_STEPS)]
    assert events[:-1] == [[]] * (STUCK_STEPS - 1) and events[-1] == [{"watch/alarm": alarm}]
    assert check(monitor, STUCK_STEPS, heads) == []
    assert f"layer 1 head 1 of 6 KV heads {phrase}" in capsys.readouterr().err
    moving = RunMonitor()  # one step in between is enough for a head not to be stuck
    assert [check(moving, step, heads if step % 20 else HEADS) for step in range(60)] == [[]] * 60


def test_spike_names_its_batch(capsys):
    monitor, noise = RunMonitor(), np.random.default_rng(0).normal(size=MIN_LOSSES)
    for step in range(MIN_LOSSES):
        assert check(monitor, step, loss__total=1 + 0.01 * noise[step]) == []
    assert check(monitor, MIN_LOSSES, loss__total=1.03) == []
    (event,) = check(monitor, MIN_LOSSES + 1, loss__total=1.5)
    assert event["watch/spike"] == pytest.approx(1.5, rel=0.02) and (
        event["watch/first_example"],
        event["watch/last_example"],
    ) == (168, 175)
    assert "examples 168 to 175" in capsys.readouterr().err
    early = RunMonitor()
    # There are too few losses to compare with.
    assert check(early, 0, loss__total=1.0) == [] and check(early, 1, loss__total=9.0) == []


def test_alarms_are_not_repeated_when_a_run_is_resumed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 3, "watch/alarm": "evicts"}) + "\n" + json.dumps({"step": 4, "loss/total": 1.0}) + "\n"
    )
    assert check(RunMonitor(tmp_path / "metrics.jsonl"), 5, cache__evict_fraction=0.995) == []
    assert check(RunMonitor(tmp_path / "none.jsonl"), 5, cache__evict_fraction=0.995) == [{"watch/alarm": "evicts"}]


def test_target_is_out_of_reach_if_the_window_covers_the_row():
    assert "at most CR 1.00" in target_advice(
        48, DMSConfig(window_size=60, target_cr=3)
    ) and "longer rows" in target_advice(48, DMSConfig(window_size=60))
    assert target_advice(4096, DMSConfig(window_size=60, target_cr=3)) is None
