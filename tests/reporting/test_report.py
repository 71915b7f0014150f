"""Run `python -m infer.report` on invented results: numbers of the tables, missing parts, hostile text, broken
files."""

import html
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markupsafe import escape
from synthetic_results import HEADER, answer_results, records, retention_results, text_groups, write

from dms_jax.command import DOORS
from dms_jax.commands.report import NAME, main, write_files
from dms_jax.errors import ConfigError
from dms_jax.evaluation.aggregate import read_measured
from dms_jax.reporting.report_colors import (
    VARIABLES,
    kept_level,
)
from dms_jax.reporting.report_page import build, page_template, whitespace_marked
from dms_jax.reporting.report_summary import digits, gap_sentence, summary

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert('1')</script>&\"$x$"


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    return records(length=128, rows=3, repeats=2, layers=3, heads=2, policies=("dms", "tova", "quest", "streaming_llm"))


@pytest.fixture(scope="module")
def files(lines, tmp_path_factory) -> dict[str, bytes]:
    return build([str(write(tmp_path_factory.mktemp("results") / "r.jsonl", lines))], "A report")


@pytest.fixture(scope="module")
def page(files) -> str:
    return files["report.html"].decode()


def text_record(policy, budget, unit, kl, nll, live, agree=0.5, length=4, **more):
    return {
        "task": "text",
        "policy": policy,
        "budget": budget,
        "unit": unit,
        "domain": "prose",
        "length": length,
        "kl": kl,
        "nll": nll,
        "agree": agree,
        "live_tokens": live,
        "nominal_cr": 2.0,
    } | more


def cells(page: str) -> list[list[str]]:
    """The cells of all tables, row by row, without tags."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.S)
    return [
        [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", row, re.S)]
        for row in rows
    ]


def test_text_table_equals_numbers_worked_by_hand(tmp_path):
    dense = [
        text_record("dense", "", unit, [0, 0, 0], nll, 4, 1.0) for unit, nll in (("a", [1, 2, 3]), ("b", [1, 1, 1]))
    ]
    dms = [
        text_record("dms", "cr2", "a", [0.1, 0.2, 0.3], [1, 2, 4], 2, 0.75, nominal_cr=2.5),
        text_record("dms", "cr2", "b", [0, 0, 0.9], [1, 1, 3], 2, 0.25, nominal_cr=2.5),
    ]
    half = [text_record("tova", "2", "a", [1, 1, 1], [2, 3, 4], 2)]  # stopped before row b
    (group,) = text_groups(dense + dms + half)
    assert (group.domain, group.length, group.budget) == ("prose", 4, 2)
    assert [result.name for result in group.results] == ["dense", "dms@cr2", "tova@2"]
    _, result, tova = group.results
    assert (
        result.kl.value == pytest.approx(0.25)
        and result.kl_max == 0.9
        and result.kl_p95 == pytest.approx(0.3 + 0.75 * 0.6)
    )
    assert result.perplexity == pytest.approx(math.exp(12 / 6)) and result.perplexity_change == pytest.approx(
        math.exp(3 / 6) - 1
    )
    assert (result.live_tokens, result.realised_cr, result.nominal_cr, result.agree.value) == (2, 2, 2.5, 0.5)
    assert tova.perplexity_change == pytest.approx(math.exp(1) - 1), "dense on row a alone"
    assert tova.kl.units == 1 and math.isnan(tova.kl.low)
    page = build([str(write(tmp_path / "r.jsonl", dense + dms + half))], "t")["report.html"].decode()
    assert [
        "dms@cr2",
        "2",
        "2.00",
        "2.50",
        "0.250 [0.200, 0.300]",
        "0.750",
        "0.870",
        "0.900",
        "7.389",
        "+64.87%",
        "50.0 [25.0, 75.0]",
    ] in cells(page)
    assert ["tova@2", "2", "2.00", "2.00", "1.00", "1.00", "1.00", "1.00", "20.09", "+171.83%", "50.0"] in cells(page)
    assert "2 rows of 4 tokens, budget 2 live tokens per head (CR 2.0); tova@2: 1 only" in page


def test_page_shows_every_number_of_the_tables(lines, page):
    shown = cells(page)
    for group in text_groups([line for line in lines if line["task"] == "text"]):
        for result in group.results:
            want = {
                f"{result.live_tokens:.0f}",
                f"{result.realised_cr:.2f}",
                f"{result.nominal_cr:.2f}",
                digits(result.kl_p95),
                digits(result.kl_p99),
                digits(result.kl_max),
                digits(result.perplexity, 4),
                f"{result.perplexity_change:+.2%}",
            }
            row = next(row for row in shown if row and row[0] == result.name and want <= set(row))
            assert row[4].startswith(digits(result.kl.value)) and row[-1].startswith(f"{100 * result.agree.value:.1f}")
            assert result.policy == "dense" or f"[{digits(result.kl.low)}, {digits(result.kl.high)}]" in row[4]
    for result in answer_results([line for line in lines if "score" in line]):
        assert any(
            row[:5]
            == [
                result.name,
                f"{100 * result.accuracy.value:.1f} [{100 * result.accuracy.low:.1f}, "
                f"{100 * result.accuracy.high:.1f}]",
                str(result.accuracy.units),
                f"{result.live_tokens:.0f}",
                f"{result.peak_live:.0f}",
            ]
            for row in shown
        ), result
    for value in HEADER.values():
        assert str(value) in page


def test_budgets_in_tokens_and_as_ratios_share_a_group(lines):
    groups = text_groups([line for line in lines if line["task"] == "text"])
    assert [(group.domain, group.budget) for group in groups] == [
        ("prose", 32),
        ("prose", 16),
        ("code", 32),
        ("code", 16),
    ]
    for group in groups:
        assert {"dense", "dms", "tova", "quest"} <= {result.policy for result in group.results}
        assert [result.kl.value for result in group.results] == sorted(result.kl.value for result in group.results)


@pytest.mark.parametrize("tokens, groups", [("341", 1), ("350", 1), ("360", 2)])
def test_budgets_within_3_percent_share_a_group(tokens, groups):
    rows = [
        text_record(*result, "a", [0.1, 0.1], [1, 1], 341.0, length=1024)
        for result in (("dms", "cr3"), ("tova", tokens))
    ]
    assert len(text_groups(rows)) == groups


@pytest.mark.parametrize("live, budget", [(250.0, 256), (300.0, 256), (600.0, 600)])
def test_arm_without_a_budget_joins_the_group_of_its_size(live, budget):
    tova = text_record("tova", "256", "a", [1, 1], [1, 1], 256.0, length=1024)
    dms = text_record("dms", "", "a", [0, 0], [1, 1], live, length=1024)
    groups = text_groups([tova, dms])
    assert budget in {group.budget for group in groups for result in group.results if result.policy == "dms"}


def test_page_loads_nothing_and_shows_every_figure(page, files):
    assert "<script" not in page and " src=" not in page and "@import" not in page and "url(#" in page
    assert set(re.findall(r"https?://[^\"' ]*", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert re.findall(r"url\((?!#)", page) == []
    assert "prefers-color-scheme: dark" in page and "Not measured" not in page
    for name in (
        "kl_tails",
        "kl_by_position",
        "accuracy",
        "needles_needle_single",
        "needles_needle_multikey",
        "cr_by_layer_and_head",
        "cr_by_position",
        "kept_text_1",
    ):
        assert files[f"{name}.png"].startswith(b"\x89PNG")
    assert page.count("<svg ") == len(files) - 2  # all but the page itself and the text, which the page has as text


def test_figures_follow_the_theme_of_the_page(page):
    svgs = "".join(re.findall(r"<svg .*?</svg>", page, re.S))
    assert "var(--ink)" in svgs and "var(--p0)" in svgs
    assert not [color for color in VARIABLES if color in svgs]
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert used <= set(re.findall(r"--(\w+):", page))


def test_report_is_the_same_for_the_same_results(lines, files, tmp_path):
    again = build([str(write(tmp_path / "r.jsonl", lines))], "A report")
    assert {name for name in files if files[name] != again[name]} <= {"report.html"}
    assert again["report.html"].decode().replace(str(tmp_path), "") == re.sub(
        r"/[^<|]*(?=/r\.jsonl)", "", files["report.html"].decode()
    )


def test_hostile_text_is_escaped(lines, tmp_path):
    hostile = []
    for line in lines:
        kept = line["task"] == "kept"
        pieces = [EVIL, "\x07\u202e", "\ufffd", "\n", *line["pieces"][4:]] if kept else None
        hostile.append(
            line
            | {"domain": EVIL}
            | ({"pieces": pieces} if kept else {})
            | ({"task": EVIL, "text": EVIL} if "score" in line and "depth" in line["groups"] else {})
        )
    unique = {json.dumps([line[key] for key in ("task", "policy", "budget", "unit")]): line for line in hostile}
    path = write(tmp_path / "r.jsonl", list(unique.values()), {EVIL: EVIL})
    built = build([str(path)], EVIL)
    page = built["report.html"].decode()
    assert "<script" not in page and str(escape(EVIL)) in page
    assert "␇\ufffd</span>" in page and ">\ufffd</span>" in page and "<i>↵</i>\n</span>" in page
    assert all(re.fullmatch(r"[\w.-]+", name) for name in built), "no path in the name of a file"


def test_template_escapes_text_and_shows_control_characters():
    page = page_template().environment.from_string("{{ text }}|<b>{{ marked(text) }}")
    shown = page.render(text="a\x00\x7f\x85\u2067<&>'\"\n\t", marked=whitespace_marked)
    escaped = "a␀␡\ufffd\ufffd&lt;&amp;&gt;&#39;&#34;"
    assert shown == f"{escaped}\n\t|<b>{escaped}<i>↵</i>\n<i>⇥</i>\t"
    assert whitespace_marked("<\n") == "&lt;<i>↵</i>\n"


def test_tokens_are_colored_by_the_fraction_of_heads_that_keep_them(lines, page):
    (result,) = retention_results([line for line in lines if line["task"] == "kept"])
    assert result.rows == 2
    spans = re.findall(r'<span class="k(\d+)( w)?" title="token (\d+): kept by (\d+)% of the heads">', page)
    assert len(spans) == result.length
    for position, (level, window, at, percent) in enumerate(spans):
        assert (
            int(at) == position
            and int(level) == kept_level(result.kept[position])
            and percent == f"{100 * result.kept[position]:.0f}"
        )
        assert bool(window) == (result.length - 1 - position <= result.window_size)


@pytest.mark.parametrize(
    "kind, missing", [("text", 4), ("kept", 4), ("greedy", 4), ("variables", 4), ("needle_single", 3)]
)
def test_report_of_one_kind_of_measurement_names_the_missing_ones(lines, tmp_path, kind, missing):
    page = build([str(write(tmp_path / "r.jsonl", [line for line in lines if line["task"] == kind]))], "t")[
        "report.html"
    ].decode()
    assert page.count("Not measured: ") == page.count("python -m infer.evaluate --model FOLDER --tasks ") == missing
    assert re.search(r'<p class="lead">[^<]{20,}</p>', page)


@pytest.mark.parametrize("policy", ["dense", "tova", "dms", "random"])
def test_report_of_one_policy_is_complete(lines, tmp_path, policy):
    """`random` is the name of a policy in results of earlier versions; here it has the numbers of another one."""
    own = [line | {"policy": policy} for line in lines if line["policy"] == policy.replace("random", "tova")]
    page = build([str(write(tmp_path / "r.jsonl", own))], "t")["report.html"].decode()
    assert policy in page and not re.search(r"\bnan\b", page)


def test_summary_says_so_if_dms_is_behind():
    rows = [text_record("dms", "", unit, [0.4, 0.4], [1, 1], 2) for unit in "ab"] + [
        text_record("tova", "2", unit, [0.1, 0.1], [1, 1], 2) for unit in "ab"
    ]
    groups = text_groups(rows)
    (sentence,) = summary(groups, [], [], [])
    assert re.search(r"\b2 live tokens of 4 \(CR 2.0\), DMS .* 0.400 nats .* prose; .* tova, .* 0.100 nats: ", sentence)
    assert sentence.endswith("DMS is 4.0 times farther away.")
    assert re.match(r"tova@2 is 0.300 nats nearer to dense than dms\b", gap_sentence(groups[0]))


def test_summary_compares_equal_sizes_only():
    rows = [
        text_record("dms", "cr2", "a", [0.4, 0.4], [1, 1], 2),
        text_record("quest", "2", "a", [0.1, 0.1], [1, 1], 4),
    ]
    (group,) = text_groups(rows)
    (sentence,) = summary([group], [], [], [])
    assert "quest" not in sentence and "no training-free method" in sentence and gap_sentence(group) == ""


def test_several_files_make_one_report_that_names_their_differences(lines, tmp_path):
    one = write(tmp_path / "1.jsonl", [line for line in lines if line["task"] == "greedy"])
    two = write(
        tmp_path / "2.jsonl", [line for line in lines if line["task"] == "kept"], HEADER | {"commit": "<b>other"}
    )
    page = build([str(one), str(two), str(one)], "t")["report.html"].decode()
    assert "The files differ in commit</b>" in page and "0123456789ab | &lt;b&gt;other" in page
    changed = write(tmp_path / "3.jsonl", [next(line for line in lines if line["task"] == "greedy") | {"match": 0.123}])
    with pytest.raises(ConfigError, match=r"3\.jsonl, line 2: greedy "):
        read_measured([str(one), str(changed)])


@pytest.mark.parametrize(
    "task, change, named",
    [
        ("text", {"kl": [0.1]}, "127"),  # the length of the log-likelihoods
        ("text", {"kl": ["a"]}, "kl"),
        ("text", {"kl": [[0.1], [0.2]]}, "kl"),
        ("text", {"kl": []}, "kl"),
        ("text", {"live_tokens": None}, "live_tokens"),
        ("text", {"length": 0}, "length"),
        ("text", {"domain": 3}, "domain"),
        ("kept", {"pieces": ["a"]}, "pieces"),
        ("kept", {"pieces": [1]}, "pieces"),
        ("kept", {"live_per_head": [[1, 2], [3]]}, "live_per_head"),
        ("variables", {"score": 1.5}, "score"),
        ("variables", {"score": float("nan")}, "score"),
        ("variables", {"answer_logprob": "x"}, "answer_logprob"),
        ("greedy", {"match": True}, "match"),
        ("greedy", {"budget": 256}, "budget"),
    ],
)
def test_invalid_record_is_refused_with_its_line_and_key(lines, tmp_path, task, change, named):
    path = write(tmp_path / "r.jsonl", [next(line for line in lines if line["task"] == task) | change])
    with pytest.raises(ConfigError, match=rf"\b{named}\b") as why:
        main([str(path), "--output", str(tmp_path / "out")])
    assert f"{path}, line 2: " in str(why.value) and not (tmp_path / "out").exists()


def test_errors_are_one_line_with_exit_code_2(lines, tmp_path):
    good = write(tmp_path / "good.jsonl", [line for line in lines if line["task"] == "greedy"])
    (tmp_path / "text.jsonl").write_text("not json\n")
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "out")
    for argv, message in (
        ([str(tmp_path / "none.jsonl"), "--output", out], "none.jsonl"),
        ([str(tmp_path / "text.jsonl"), "--output", out], "text.jsonl, line 1 "),
        ([str(write(tmp_path / "empty.jsonl", [])), "--output", out], "empty.jsonl"),
        ([str(good), "--output", str(tmp_path / "file")], str(tmp_path / "file")),
        ([str(good)], "--output"),
        ([str(good), "--ouput", out], "--output"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", DOORS[NAME], *argv], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert done.stdout == "" and not Path(out).exists()


def test_main_replaces_the_files_of_an_earlier_report(lines, tmp_path, capsys):
    good, out = (
        write(tmp_path / "good.jsonl", [line for line in lines if line["task"] in ("greedy", "kept")]),
        tmp_path / "a" / "out",
    )
    for _ in range(2):
        assert main([str(good), "--output", str(out), "--title", "<T>"]) == 0
    assert "report.html and 3 PNGs" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == [
        "cr_by_layer_and_head.png",
        "cr_by_position.png",
        "kept_text_1.png",
        "report.html",
    ]
    assert "<title>&lt;T&gt;</title>" in (out / "report.html").read_text(encoding="utf-8")


def test_page_of_somebody_else_is_left(lines, tmp_path):
    results = write(tmp_path / "good.jsonl", [line for line in lines if line["task"] == "greedy"])
    (tmp_path / "report.html").write_text("my thesis")
    with pytest.raises(ConfigError, match="not a report of this command"):
        main([str(results), "--output", str(tmp_path)])
    assert (tmp_path / "report.html").read_text() == "my thesis"


def test_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    write_files(tmp_path, {"report.html": b"old"})

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        write_files(tmp_path, {"report.html": b"new"})
    assert os.listdir(tmp_path) == ["report.html"] and (tmp_path / "report.html").read_bytes() == b"old"
