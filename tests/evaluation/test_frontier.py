"""Frontiers and gaps in cases worked by hand, and the hyper-scaling tables of saved results."""

import json

import numpy as np
import pytest

from dms_jax.commands.hyperscale import main
from dms_jax.errors import ConfigError
from dms_jax.evaluation.frontier import Point, frontier, gap
from dms_jax.evaluation.results import read_results
from dms_jax.evaluation.scaling import Configuration, analyze, parse_configurations, table


def points(*pairs):
    return [Point(cost, accuracy) for cost, accuracy in pairs]


def test_frontier_has_the_points_that_no_cheaper_point_equals():
    mine = points((4, 0.5), (1, 0.2), (2, 0.2), (3, 0.6), (8, 0.6), (1, 0.1))
    assert frontier(mine) == points((1, 0.2), (3, 0.6))
    assert frontier([]) == []


def test_gap_is_the_mean_over_the_logarithm_of_the_common_costs():
    # The first is a line in log2 of the cost: 0.2, 0.35, 0.5, 0.65, 0.8 at 1, 2, 4, 8, 16. The other is 0.3 from 2 on.
    found = gap(points((1, 0.2), (16, 0.8)), points((2, 0.3), (8, 0.3)))
    assert (found.low, found.high) == (2, 8)
    np.testing.assert_allclose(found.mean, (0.35 + 0.65) / 2 - 0.3)
    # Here the other has a kink: it rises from 0.3 to 0.5 between costs 2 and 4, and then stays level.
    found = gap(points((1, 0.2), (16, 0.8)), points((2, 0.3), (4, 0.5), (8, 0.4)))
    np.testing.assert_allclose(found.mean, ((0.05 + 0.0) / 2 + (0.0 + 0.15) / 2) / 2)


def test_gap_to_itself_is_zero_and_swapping_changes_the_sign(rng):
    a, b = ([Point(c, p) for c, p in zip(rng.uniform(1, 9, 6), rng.random(6), strict=True)] for _ in range(2))
    assert gap(a, a).mean == 0
    np.testing.assert_allclose(gap(a, b).mean, -gap(b, a).mean)
    np.testing.assert_allclose(gap([p._replace(accuracy=p.accuracy + 0.25) for p in a], a).mean, 0.25)


def test_gap_needs_a_common_cost():
    assert gap(points((1, 0.5), (2, 0.9)), points((4, 0.1), (5, 0.2))) is None
    assert gap([], points((1, 1))) is None
    assert gap(points((1, 0.5), (2, 0.9)), points((2, 0.4), (3, 0.5))) == (pytest.approx(0.5), 2, 2)


def test_configurations_are_parsed():
    assert parse_configurations("4-512-2, 1-256-1") == (Configuration(4, 512, 2.0), Configuration(1, 256, 1.0))
    for bad in ("4-512", "0-512-2", "4-512-0.5", "4-x-2", "4-512-nan", ""):
        with pytest.raises(ConfigError, match=f"--configs.*{bad}"):
            parse_configurations(bad)


def saved(path):
    lines = [{"header": {}, "options": {}}]
    for policy, config, accuracy, reads in [
        ("dense", "1-64-1", 0.25, 100),
        ("dense", "2-64-1", 0.5, 200),
        ("dms", "2-64-4", 0.5, 50),
        ("dms", "4-64-2", 0.75, 200),
        ("dms", "4-64-4", 0.25, 100),
    ]:
        for i in range(4):
            lines.append(
                {
                    "task": "hyperscale/gsm8k",
                    "policy": policy,
                    "budget": config,
                    "unit": str(i),
                    "score": float(i < 4 * accuracy),
                    "kv_reads": reads,
                    "peak_live": reads / 2,
                    "live_tokens": reads / 4,
                    "realised_cr": 2.0,
                    "new_tokens": 64,
                    "prefill_seconds": 1.0,
                    "decode_seconds": 2.0,
                }
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_tables_come_from_saved_results(tmp_path, capsys):
    saved(tmp_path / "s.jsonl")
    lines = analyze(read_results(tmp_path / "s.jsonl"))
    on = {line["config"]: line["on_frontier"] for line in lines if "config" in line and line["policy"] == "dms"}
    assert "kv_reads" in on["2-64-4"] and "kv_reads" in on["4-64-2"] and not on["4-64-4"]
    found = next(line for line in lines if line.get("cost") == "kv_reads")["gap"]
    # dms: 0.5 at 50, 0.75 at 200, so 0.625 at 100; dense: 0.25 at 100, 0.5 at 200.
    np.testing.assert_allclose((found["mean"], found["low"], found["high"]), ((0.375 + 0.25) / 2, 100, 200))
    assert next(line for line in lines if line.get("config") == "2-64-4")["decode_tokens_per_s"] == 32
    main(["--results", str(tmp_path / "s.jsonl")])
    assert capsys.readouterr().out.strip() == table(lines).strip()
    assert "dms against dense over KV reads: +31.3% accuracy on average from 100 to 200" in table(lines)


def test_options_that_cannot_work_are_named(tmp_path):
    for argv in ([], ["--model", "x", "--results", "y"]):
        with pytest.raises(ConfigError, match="--model.*--results"):
            main(argv)
    (tmp_path / "e.jsonl").write_text('{"header": {}}\n')
    with pytest.raises(ConfigError, match="infer.hyperscale.*--output"):
        main(["--results", str(tmp_path / "e.jsonl")])
    with pytest.raises(ConfigError, match="--task.*'gsm'.*gsm8k"):
        main(["--model", "x", "--task", "gsm"])
    for argv, named in ((["--configs", "16-64-1"], "--batch.*16.*got 8"), (["--chunk", "0"], "--chunk.*got 0")):
        with pytest.raises(ConfigError, match=named):
            main(["--model", "x", *argv])
