"""Alarms, each once and with advice; loss spikes with their batch."""

import json

import numpy as np
import pytest

from dms_jax.config import DMSConfig
from dms_jax.training.watch import LEAST, STUCK_STEPS, Watch, target_advice

CALM = {"loss/total": 1.0, "cache/evict_fraction": 0.5, "cache/target_cr": 2.0, "cache/nominal_cr": 2.0}
HEADS = np.full((3, 2), 0.5)


def look(watch, step=0, heads=HEADS, gates=True, **changes):
    metrics = CALM | {key.replace("__", "/"): value for key, value in changes.items()}
    return watch.look(step, metrics, heads, (8 * step, 8 * step + 7), gates)


@pytest.mark.parametrize(
    ("alarm", "said", "changes"),
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
def test_a_collapse_is_said_once_with_advice(alarm, said, changes, capsys):
    watch = Watch()
    assert look(watch) == [] and look(watch, gates=False, **changes) == []
    assert {"watch/alarm": alarm} in look(watch, 3, **changes)
    assert look(watch, 4, **changes) == []
    err = capsys.readouterr().err
    assert err.count(said) == 1 and "step 3" in err and "optimizer.learning_rate" in err


@pytest.mark.parametrize(
    ("value", "alarm", "said"), [(0.0, "head_keeps", "evict nothing"), (1.0, "head_evicts", "evict everything")]
)
def test_a_head_that_is_stuck_is_named(value, alarm, said, capsys):
    watch, heads = Watch(), HEADS.copy()
    heads[1, 1] = value
    events = [look(watch, step, heads) for step in range(STUCK_STEPS)]
    assert events[:-1] == [[]] * (STUCK_STEPS - 1) and events[-1] == [{"watch/alarm": alarm}]
    assert look(watch, STUCK_STEPS, heads) == []
    assert f"layer 1 head 1 of 6 KV heads {said}" in capsys.readouterr().err
    moving = Watch()  # one step in between is enough: it is not stuck
    assert [look(moving, step, heads if step % 20 else HEADS) for step in range(60)] == [[]] * 60


def test_a_spike_names_its_batch(capsys):
    watch, noise = Watch(), np.random.default_rng(0).normal(size=LEAST)
    for step in range(LEAST):
        assert look(watch, step, loss__total=1 + 0.01 * noise[step]) == []
    assert look(watch, LEAST, loss__total=1.03) == []
    (event,) = look(watch, LEAST + 1, loss__total=1.5)
    assert event["watch/spike"] == pytest.approx(1.5, rel=0.02) and (
        event["watch/first_example"],
        event["watch/last_example"],
    ) == (168, 175)
    assert "examples 168 to 175" in capsys.readouterr().err
    early = Watch()
    assert (
        look(early, 0, loss__total=1.0) == [] and look(early, 1, loss__total=9.0) == []
    )  # nothing to compare with yet


def test_a_resumed_run_does_not_repeat_its_alarms(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 3, "watch/alarm": "evicts"}) + "\n" + json.dumps({"step": 4, "loss/total": 1.0}) + "\n"
    )
    assert look(Watch(tmp_path / "metrics.jsonl"), 5, cache__evict_fraction=0.995) == []
    assert look(Watch(tmp_path / "none.jsonl"), 5, cache__evict_fraction=0.995) == [{"watch/alarm": "evicts"}]


def test_a_window_that_covers_the_row_puts_the_target_out_of_reach():
    assert "at most CR 1.00" in target_advice(
        48, DMSConfig(window_size=60, target_cr=3)
    ) and "longer rows" in target_advice(48, DMSConfig(window_size=60))
    assert target_advice(4096, DMSConfig(window_size=60, target_cr=3)) is None
