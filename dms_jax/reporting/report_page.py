"""The page of a report: HTML without scripts and without anything fetched. All that comes from files goes through `text`."""

import html
import math
import re
from collections.abc import Iterable, Sequence

from dms_jax.evaluation.aggregate import AnswerArm, GreedyArm, KeptArm, TextGroup
from dms_jax.evaluation.statistics import Interval
from dms_jax.reporting.report_colors import LEVELS, VARIABLES, kept_level, policy_look, variables
from dms_jax.reporting.report_figures import Drawing
from dms_jax.reporting.report_summary import digits, gap_sentence, spread

CSS = """
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1200px; padding: 2rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .8rem } h2 { font-size: 1.25rem; margin: 3rem 0 .4rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem }
p { max-width: 46rem; margin: .4rem 0 } .lead { font-size: 1.08rem } .note, figcaption, caption { color: var(--muted); font-size: .9rem }
figure { margin: 1.2rem 0; overflow-x: auto } figure svg { max-width: max(100%, 46rem); height: auto; display: block }
figcaption { max-width: 46rem; margin-top: .4rem }
svg text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif !important }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; margin: .6rem 0 1.4rem }
caption { text-align: left; padding-bottom: .3rem } th, td { padding: .22rem .8rem .22rem 0; text-align: right; white-space: nowrap }
th { font-weight: 600; vertical-align: bottom; border-bottom: 1px solid var(--muted) } td { border-bottom: 1px solid var(--rule) }
th:first-child, td:first-child { text-align: left } th small, td small { color: var(--muted); font-weight: 400; font-size: .86em }
.under { margin: -1rem 0 1.8rem } tr.first td { font-weight: 600 } tr.dense td { color: var(--muted) }
.dot { display: inline-block; width: .62em; height: .62em; border-radius: 50%; margin-right: .5em }
details { margin-top: .8rem } summary { cursor: pointer } .provenance { font-size: .8rem }
.provenance td { white-space: normal; overflow-wrap: anywhere }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; line-height: 1.75; padding: 1rem; border: 1px solid var(--rule);
  border-radius: 4px; max-height: 40rem; overflow-y: auto; margin: .6rem 0 }
.tokens span { padding: .12em 0 } .tokens i { font-style: normal; color: var(--muted) }
.w { text-decoration: underline dotted 1.5px; text-underline-offset: 4px }
.key span { outline: 1px solid var(--rule); display: inline-block; width: 1.3em; height: 1em; vertical-align: -.12em }
.key span.w { outline: none; width: auto; height: auto; vertical-align: baseline }
"""


def text(value: object) -> str:
    """Escaped; what would turn or hide the text around it (controls, directions) becomes visible."""
    shown = re.sub("[\x00-\x08\x0b-\x1f\x7f]", lambda m: chr(0x2400 + ord(m[0])) if m[0] != "\x7f" else "␡", str(value))
    return html.escape(re.sub("[\x80-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", shown))


def page(
    title: str, lead: Sequence[str], headers: dict[str, dict], sections: Iterable[str], missing: Sequence[str]
) -> str:
    tokens = "".join(f".k{level} {{ background: var(--k{level}) }}" for level in range(LEVELS + 1))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>:root {{ color-scheme: light dark; {variables(False)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(True)} }} }}{CSS}{tokens}</style></head><body>
<h1>{text(title)}</h1>
<p class="lead">{text(" ".join(lead))}</p>
<p class="note">DMS is a language model retrofitted to decide, token by token and in each attention head, which keys and values to forget.
<b>Live tokens</b>: those a KV head still holds at the end, mean over layers and heads. <b>CR</b>, the compression ratio: all tokens / live tokens.
<b>Dense</b>: the model that keeps everything. All
others but DMS and its ablation immediate_eviction are training-free: they apply a rule to the dense model's cache.</p>
{_provenance(headers)}
{"".join(sections)}
{"".join(f'<p class="note">{line}</p>' for line in missing)}
</body></html>
"""


def section(title: str, *content: str) -> str:
    return f"<section><h2>{text(title)}</h2>{''.join(content)}</section>"


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def drawing(figure: Drawing, caption: str) -> str:
    svg = figure.svg.replace("<svg ", f'<svg role="img" aria-label="{text(figure.alt)}" ', 1)
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>"


def text_tables(groups: list[TextGroup]) -> str:
    heads = [
        "policy",
        "live tokens<br><small>per KV head</small>",
        "realised<br>CR",
        "nominal<br>CR",
        "KL mean<br><small>nats [95%]</small>",
        "KL p95<br><small>nats</small>",
        "KL p99<br><small>nats</small>",
        "KL max<br><small>nats</small>",
        "perplexity",
        "vs dense",
        "top-1 agree<br><small>% [95%]</small>",
    ]
    tables = []
    for group in groups:
        size = (
            f", budget {group.budget} live tokens per head (CR {group.length / group.budget:.1f})"
            if group.budget
            else ""
        )
        rows = [
            (
                arm.policy,
                [
                    _named(arm.name, arm.policy),
                    f"{arm.live_tokens:.0f}",
                    f"{arm.realised_cr:.2f}",
                    f"{arm.nominal_cr:.2f}",
                    _with(digits(arm.kl.value), spread(arm.kl)),
                    digits(arm.kl_p95),
                    digits(arm.kl_p99),
                    digits(arm.kl_max),
                    digits(arm.perplexity, 4),
                    "–" if math.isnan(arm.perplexity_change) else f"{arm.perplexity_change:+.2%}",
                    _with(f"{100 * arm.agree.value:.1f}", spread(arm.agree, percent=True)),
                ],
            )
            for arm in group.arms
        ]
        most = max(arm.kl.units for arm in group.arms)
        fewer = "".join(f"; {arm.name}: {arm.kl.units} only" for arm in group.arms if arm.kl.units < most)
        caption = f"{group.domain}, {most} rows of {group.length} tokens{size}{fewer}"
        tables.append(_table(caption, heads, rows, gap_sentence(group)))
    return "".join(tables)


def answer_tables(arms: list[AnswerArm]) -> str:
    heads = [
        "policy",
        "accuracy<br><small>% [95%]</small>",
        "problems",
        "live tokens<br><small>per KV head</small>",
        "peak live<br><small>tokens</small>",
        "realised<br>CR",
        "KV reads<br><small>pairs</small>",
        "log p(answer)<br><small>nats</small>",
    ]
    tables = []
    for task in dict.fromkeys(arm.task for arm in arms):
        rows = [
            (
                arm.policy,
                [
                    _named(arm.name, arm.policy),
                    _percent(arm.accuracy),
                    str(arm.accuracy.units),
                    f"{arm.live_tokens:.0f}",
                    f"{arm.peak_live:.0f}",
                    f"{arm.realised_cr:.2f}",
                    f"{arm.kv_reads:.0f}",
                    digits(arm.answer_logprob),
                ],
            )
            for arm in arms
            if arm.task == task
        ]
        tables.append(_table(task, heads, rows))
    return "".join(tables)


def greedy_tables(arms: list[GreedyArm]) -> str:
    heads = [
        "policy",
        "tokens as dense<br><small>% [95%]</small>",
        "first difference<br><small>token, median</small>",
        "tokens",
        "texts",
        "live tokens<br><small>per KV head</small>",
        "realised<br>CR",
    ]
    return "".join(
        _table(
            domain,
            heads,
            [
                (
                    arm.policy,
                    [
                        _named(arm.name, arm.policy),
                        _percent(arm.match),
                        f"{arm.divergence:.0f}",
                        f"{arm.tokens:.0f}",
                        str(arm.match.units),
                        f"{arm.live_tokens:.0f}",
                        f"{arm.realised_cr:.2f}",
                    ],
                )
                for arm in arms
                if arm.domain == domain
            ],
        )
        for domain in dict.fromkeys(arm.domain for arm in arms)
    )


def kept_key() -> str:
    scale = "".join(f'<span class="k{level}"></span>' for level in range(0, LEVELS + 1, 2))
    return f'<p class="key">forgotten by all heads {scale} kept by all heads &nbsp;&nbsp; <span class="w">dotted</span>: still inside the window</p>'


def kept_text(arm: KeptArm, is_open: bool) -> str:
    """Each token on the colour of its kept fraction; hovering says its position and fraction."""
    spans = []
    for position, (piece, kept) in enumerate(zip(arm.pieces, arm.kept, strict=True)):
        window = " w" if position >= arm.length - 1 - arm.window_size else ""
        shown = text(piece).replace("\n", "<i>↵</i>\n").replace("\t", "<i>⇥</i>\t")
        spans.append(
            f'<span class="k{kept_level(kept)}{window}" title="token {position}: kept by {kept:.0%} of the heads">{shown}</span>'
        )
    head = f"{arm.domain}, {arm.name}: {arm.length} tokens, CR {arm.realised_cr:.2f}, window {arm.window_size}"
    return f'<details{" open" if is_open else ""}><summary>{text(head)}</summary><div class="tokens">{"".join(spans)}</div></details>'


def _table(caption: str, heads: list[str], rows: list[tuple[str, list[str]]], note: str = "") -> str:
    """`heads` and cells are HTML."""
    body = "".join(
        f'<tr class="{_row_class(policy)}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
        for policy, cells in rows
    )
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    table = f"<table><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>' + (f'<p class="note under">{text(note)}</p>' if note else "")


def _row_class(policy: str) -> str:
    return {"dms": "first", "dense": "dense"}.get(policy, "")


def _named(name: str, policy: str) -> str:
    return f'<span class="dot" style="background: var(--{VARIABLES[policy_look(policy).color]})"></span>{text(name)}'


def _with(value: str, interval: str) -> str:
    return f"{value} <small>{interval}</small>" if interval else value


def _percent(interval: Interval) -> str:
    return _with(f"{100 * interval.value:.1f}", spread(interval, percent=True))


def _provenance(headers: dict[str, dict]) -> str:
    keys = list(dict.fromkeys(key for header in headers.values() for key in header))
    lines = []
    for key in keys:
        values = list(dict.fromkeys(str(header[key]) if key in header else "–" for header in headers.values()))
        lines.append(f"<tr><td>{text(key)}</td><td>{' | '.join(map(text, values))}</td></tr>")
    differs = [key for key in keys if len({str(header.get(key)) for header in headers.values()}) > 1]
    warning = (
        f'<p class="note"><b>The files differ in {text(", ".join(differs))}</b>: compare across them with care.</p>'
        if differs
        else ""
    )
    files = f"<tr><td>files</td><td>{' | '.join(map(text, headers))}</td></tr>"
    table = f"<table>{files}{''.join(lines)}</table>"
    return f'{warning}<details class="provenance"><summary class="note">Where the numbers come from</summary>{table}</details>'
