"""A results file like that of an evaluation, with invented numbers of the right shape, for the tests of tables and
reports.

python tests/synthetic_results.py FILE
"""

import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np

from dms_jax.evaluation import aggregate
from dms_jax.evaluation.result_records import record_of

FORGETS = {
    "dms": 0.25,
    "snapkv": 0.9,
    "tova": 1.0,
    "h2o": 1.2,
    "observed_attention": 1.3,
    "keydiff": 2.0,
    "quest": 0.15,
    "streaming_llm": 1.6,
    "knorm": 4.0,
    "random_all": 6.0,
}
HEADER = {
    "dms_jax": "0.1.0",
    "python": "3.11.7",
    "jax": "0.10.2",
    "device": "cpu",
    "commit": "0123456789ab",
    "model": "runs/retrofit/export",
    "model_sha256": "9f" * 32,
}
TEXT = """The lighthouse at Skarvøya was built in 1868, after the brig Maren had gone down within sight of the harbour.

Its keeper, Anders Lund, wrote in his log each evening: the wind, the ships, the oil that was left. "Nothing passed," \
he wrote on
most days, and on some days "Two barques, northbound." When the lamp was made electric in 1951 \
nobody thought of the log; it lay in
a drawer under the stairs until Ingrid Lund, a granddaughter, found 31 volumes of it.

def oil_left(days, start=480):
\treturn start - 3.5 * days

She counted. In 83 years the lamp had failed on 6 nights, and on one of them, the 14th of November 1893, \
the Thetis ran aground.
The log of that night has a single line: "Lamp dark from two to five. A.L. asleep."
"""


def text_groups(lines: list[dict]) -> list[aggregate.TextGroup]:
    return aggregate.text_groups(map(record_of, lines))


def answer_results(lines: list[dict]) -> list[aggregate.AnswerResult]:
    return aggregate.answer_results(map(record_of, lines))


def retention_results(lines: list[dict]) -> list[aggregate.RetentionResult]:
    return aggregate.retention_results(map(record_of, lines))


def records(length=1024, rows=8, repeats=12, layers=12, heads=4, policies=tuple(FORGETS), seed=0) -> list[dict]:
    out = []
    for domain in ("prose", "code"):
        out += _texts(domain, length, rows, policies, seed)
    for task, hardness in (("needle_single", 1.0), ("needle_multikey", 2.0), ("variables", 1.6)):
        out += _answers(task, hardness, length, repeats, policies, seed)
    return [*out, *_greedy(rows, length, policies, seed)] + [_kept(layers, heads, unit, seed) for unit in range(2)]


def write(path: Path, lines: list[dict], header: dict | None = None) -> Path:
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in [{"header": header or HEADER, "options": {"seed": 0}}, *lines]),
        encoding="utf-8",
    )
    return path


def arms(length: int, policies: tuple[str, ...]):
    """Yield (policy, budget, live tokens). DMS has a ratio, the others a number of tokens; quest keeps all and reads
    its budget."""
    for ratio in (4, 8):
        for policy in policies:
            live = {"dms": length / ratio * 1.03, "quest": length}.get(policy, length // ratio)
            yield policy, f"cr{ratio}" if policy == "dms" else str(length // ratio), live


def _rng(*names) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(names).encode()))


def _texts(domain: str, length: int, rows: int, policies: tuple[str, ...], seed: int):
    for row in range(rows):
        unit = f"{domain}/{row}"
        nll = _rng(seed, unit).gamma(1.2, 2.0 if domain == "prose" else 1.1, length - 1)
        dense = {
            "task": "text",
            "policy": "dense",
            "budget": "",
            "unit": unit,
            "domain": domain,
            "length": length,
            "kl": [0.0] * (length - 1),
            "nll": _short(nll),
            "agree": 1.0,
            "live_tokens": float(length),
            "mean_live_tokens": length / 2,
            "realised_cr": 1.0,
            "nominal_cr": 1.0,
        }
        yield dense
        for policy, budget, live in arms(length, policies):
            rng = _rng(seed, unit, policy, budget)
            full = length / 8 if policy == "dms" else float(budget)
            pressure = np.clip((np.arange(length - 1) - full) / length, 0, None) ** 0.5 * (
                length / live if policy != "quest" else 4
            )
            kl = FORGETS[policy] * 0.02 * pressure * rng.lognormal(-1.2, 1.9, length - 1)
            kl = 12 * np.tanh(kl / 12)
            worse = np.maximum(nll + kl * rng.normal(0.7, 1, length - 1), 0)
            yield dense | {
                "policy": policy,
                "budget": budget,
                "kl": _short(kl),
                "nll": _short(worse),
                "agree": float(1 - np.mean(np.minimum(kl * 1.5, 0.8))),
                "live_tokens": live * float(rng.normal(1, 0.01)),
                "mean_live_tokens": live * 0.8,
                "realised_cr": length / live,
                "nominal_cr": length / live * (1.1 if policy == "dms" else 1),
            }


def _answers(task: str, hardness: float, length: int, repeats: int, policies: tuple[str, ...], seed: int):
    for size in (length // 4, length // 2, length, 2 * length):
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
            for policy, budget, live in [("dense", "", size), *arms(length, policies)]:
                live = size / int(budget[2:]) * 1.03 if policy == "dms" else min(live, size)
                for repeat in range(repeats if task != "variables" else 1):
                    unit = f"{size}/{depth}/{repeat}"
                    rng = _rng(seed, task, unit, policy, budget)
                    lost = (
                        0.01
                        if policy == "dense"
                        else hardness * FORGETS[policy] * 0.12 * np.log2(max(size / live, 1)) * (1.4 - depth)
                    )
                    groups = {"length": size, "depth": depth} if task != "variables" else {"length": size}
                    yield {
                        "task": task,
                        "policy": policy,
                        "budget": budget,
                        "unit": unit,
                        "score": float(rng.random() > min(lost, 0.97)),
                        "answer_logprob": -float(rng.gamma(1 + lost * 8, 0.3)),
                        "live_tokens": float(live),
                        "realised_cr": size / live,
                        "kv_reads": float(live * 12),
                        "peak_live": float(live + 40),
                        "text": "the number is 7 < 8",
                        "groups": groups,
                    }


def _greedy(rows: int, length: int, policies: tuple[str, ...], seed: int):
    for row in range(rows):
        for policy, budget, live in arms(length, policies):
            first = int(
                min(64, _rng(seed, row, policy, budget).geometric(0.02 * FORGETS[policy] / (live / length) ** 0.5))
            )
            yield {
                "task": "greedy",
                "policy": policy,
                "budget": budget,
                "unit": f"prose/{row}",
                "domain": "prose",
                "match": min(1.0, first / 64 + 0.02),
                "divergence": first,
                "tokens": 64,
                "live_tokens": float(live),
                "realised_cr": length / live,
            }


def _kept(layers: int, heads: int, unit: int, seed: int) -> dict:
    pieces = re.findall(r"\n|\t| ?[^\W\d_]{1,6}|[^\W\d_]+| ?\d{1,2}| ?[^\w\s]|_| ", TEXT * 2)
    length, window = len(pieces), 32
    rng = _rng(seed, "kept", unit)
    keeps = np.array(
        [
            0.75
            if re.search(r"[A-Z\d]", p)
            else 0.08
            if re.fullmatch(r" ?(the|of|a|in|and|on|was|to|it|had|that|is)", p)
            else 0.3
            for p in pieces
        ]
    )
    keeps = np.clip(keeps + rng.normal(0, 0.08, length), 0, 1)
    keeps[:2], keeps[length - 1 - window :] = 1, 1
    share = np.clip(rng.beta(1.2, 2.6, (layers, heads)) + 0.1, 0, 1)
    by_position = np.minimum(np.arange(1, length + 1), window + 0.32 * np.arange(1, length + 1))
    live = share / share.mean() * by_position[-1]
    return {
        "task": "kept",
        "policy": "dms",
        "budget": "cr4",
        "unit": f"prose/{unit}",
        "domain": "prose",
        "pieces": pieces,
        "kept": _short(keeps),
        "live_per_head": np.minimum(live, length).round(1).tolist(),
        "live_by_position": _short(by_position),
        "length": length,
        "window_size": window,
        "realised_cr": length / float(live.mean()),
    }


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


if __name__ == "__main__":
    write(Path(sys.argv[1]), records())
