"""What a report shows, computed from files of results: arms compared on text and on answers, and what DMS keeps."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dms_jax.errors import ConfigError
from dms_jax.evaluation.results import TEXT_TASKS, arm_name, key_of, problem_of, read_results
from dms_jax.evaluation.statistics import Interval, bootstrap_mean, percentiles, wilson

NUMBER, COUNT, NUMBERS, TABLE, TEXT = "a number", "a number >= 1", "a list of numbers", "a table of numbers", "text"
FIELDS = {
    "text": {
        "domain": TEXT,
        "length": COUNT,
        "kl": NUMBERS,
        "nll": NUMBERS,
        "agree": NUMBER,
        "live_tokens": NUMBER,
        "nominal_cr": NUMBER,
    },
    "kept": {
        "domain": TEXT,
        "length": COUNT,
        "kept": NUMBERS,
        "live_per_head": TABLE,
        "live_by_position": NUMBERS,
        "window_size": NUMBER,
    },
    "greedy": {
        "domain": TEXT,
        "match": NUMBER,
        "divergence": NUMBER,
        "tokens": NUMBER,
        "live_tokens": NUMBER,
        "realised_cr": NUMBER,
    },
    "answers": {"score": NUMBER, "live_tokens": NUMBER, "realised_cr": NUMBER, "kv_reads": NUMBER, "peak_live": NUMBER},
}


class Measured(NamedTuple):
    headers: dict[str, dict[str, Any]]  # file -> provenance
    records: list[dict[str, Any]]

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if _kind(record) == kind]


class TextArm(NamedTuple):
    """One policy under one budget on the rows of one domain. KL is KL(dense || arm) in nats per predicted token."""

    name: str
    policy: str
    live_tokens: float  # mean over layers, heads and rows of the pairs held at the end of a row
    realised_cr: float
    nominal_cr: float
    kl: Interval  # over rows
    kl_p95: float
    kl_p99: float
    kl_max: float
    perplexity: float
    perplexity_change: float  # against dense on the same rows; nan where dense was not measured
    agree: Interval  # over rows
    kl_rows: dict[str, np.ndarray]  # unit -> KL by position

    @property
    def kl_tokens(self) -> np.ndarray:
        return np.concatenate(list(self.kl_rows.values()))


class TextGroup(NamedTuple):
    """Arms that may be compared: one domain, one length, one budget of live tokens (None: no arm has a budget)."""

    domain: str
    length: int
    budget: int | None
    arms: tuple[TextArm, ...]  # by mean KL


class AnswerArm(NamedTuple):
    task: str
    name: str
    policy: str
    accuracy: Interval
    live_tokens: float
    realised_cr: float
    kv_reads: float
    peak_live: float
    answer_logprob: float  # nan where not measured
    cells: dict[tuple[float, float], Interval]  # (length, depth) -> accuracy, of needles


class GreedyArm(NamedTuple):
    domain: str
    name: str
    policy: str
    match: Interval
    divergence: float  # median index of the first token that differs
    tokens: float
    live_tokens: float
    realised_cr: float


class KeptArm(NamedTuple):
    """What DMS holds of the rows of one domain; the first row is shown token by token."""

    domain: str
    name: str
    length: int
    window_size: int
    rows: int
    live_per_head: np.ndarray  # [L K] at the end, mean over rows
    live_by_position: np.ndarray  # [T] mean over rows and heads
    pieces: tuple[str, ...]
    kept: np.ndarray  # [T] fraction of (layer, head) that hold the token at the end

    @property
    def realised_cr(self) -> float:
        return self.length / float(self.live_per_head.mean())


def read_measured(paths: Sequence[str]) -> Measured:
    """All measurements of all files. Raises ConfigError for a record that cannot be shown, or measured twice and otherwise."""
    headers, seen = {}, {}
    for path in dict.fromkeys(paths):
        results = read_results(path)
        headers[path] = clean(results.header) if isinstance(results.header, dict) else {}
        for number, raw in enumerate(results.records, 2):
            record = clean(raw)
            if wrong := _wrong(record):
                raise ConfigError(
                    f"{path}, line {number}: {wrong}; measure it again with infer.evaluate and another --output"
                )
            key = key_of(record)
            if repr(seen.setdefault(key, record)) != repr(record):  # repr: nan equals nan
                raise ConfigError(
                    f"{path}, line {number}: {' '.join(key)} was measured before with another result; report on the files one by one"
                )
    if not seen:
        raise ConfigError(f"no measurement in {', '.join(map(str, paths))}; run infer.evaluate with --output first")
    return Measured(headers, list(seen.values()))


def clean(value: Any) -> Any:
    """The same JSON with strings that can be written as UTF-8: half a surrogate pair becomes the replacement character."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list) and not _is_numbers(value) else value


def text_groups(records: list[dict]) -> list[TextGroup]:
    """Groups by domain, length and budget; dense is in each, an arm without a budget where its live tokens are nearest."""
    groups = []
    for (domain, length), rows in _grouped(records, lambda r: (r["domain"], int(r["length"]))).items():
        dense = {r["unit"]: r for r in rows if r["policy"] == "dense"}
        by_arm = _grouped(rows, lambda r: (arm_name(r), _budget_tokens(r["budget"], r["length"])))
        arms = {name: (budget, _text_arm(found, dense)) for (name, budget), found in by_arm.items()}
        budgets = _merged({budget for budget, _ in arms.values() if budget})
        members = defaultdict(list)
        for budget, arm in arms.values():
            if arm.policy == "dense":
                continue
            members[budgets[budget] if budget else _nearest(set(budgets.values()), arm.live_tokens)].append(arm)
        for budget in sorted(members, key=lambda b: b or 0, reverse=True) or [None]:
            compared = members[budget] + [arm for _, arm in arms.values() if arm.policy == "dense"]
            groups.append(TextGroup(domain, length, budget, tuple(sorted(compared, key=lambda arm: arm.kl.value))))
    return groups


def answer_arms(records: list[dict]) -> list[AnswerArm]:
    """By task as they come, the most accurate first."""
    arms = []
    for (task, name), rows in _grouped(records, lambda r: (r["task"], arm_name(r))).items():
        logprobs = [r["answer_logprob"] for r in rows if r.get("answer_logprob") is not None]
        cells = _grouped(
            [r for r in rows if _has_cell(r)], lambda r: (float(r["groups"]["length"]), float(r["groups"]["depth"]))
        )
        live, cr, reads, peak = (_mean(rows, key) for key in ("live_tokens", "realised_cr", "kv_reads", "peak_live"))
        arms.append(
            AnswerArm(
                task,
                name,
                rows[0]["policy"],
                _accuracy(rows),
                live,
                cr,
                reads,
                peak,
                float(np.mean(logprobs)) if logprobs else math.nan,
                {cell: _accuracy(found) for cell, found in cells.items()},
            )
        )
    tasks = list(dict.fromkeys(arm.task for arm in arms))
    return sorted(arms, key=lambda arm: (tasks.index(arm.task), -arm.accuracy.value, arm.live_tokens))


def greedy_arms(records: list[dict]) -> list[GreedyArm]:
    arms = [
        GreedyArm(
            domain,
            name,
            rows[0]["policy"],
            bootstrap_mean([r["match"] for r in rows]),
            float(np.median([r["divergence"] for r in rows])),
            _mean(rows, "tokens"),
            _mean(rows, "live_tokens"),
            _mean(rows, "realised_cr"),
        )
        for (domain, name), rows in _grouped(records, lambda r: (r["domain"], arm_name(r))).items()
    ]
    return sorted(arms, key=lambda arm: (arm.domain, -arm.match.value))


def kept_arms(records: list[dict]) -> list[KeptArm]:
    found = _grouped(records, lambda r: (r["domain"], arm_name(r), int(r["length"]), np.shape(r["live_per_head"])))
    return [
        KeptArm(
            domain,
            name,
            length,
            int(rows[0]["window_size"]),
            len(rows),
            np.mean([r["live_per_head"] for r in rows], axis=0),
            np.mean([r["live_by_position"] for r in rows], axis=0),
            tuple(rows[0]["pieces"]),
            np.asarray(rows[0]["kept"], float),
        )
        for (domain, name, length, _), rows in found.items()
    ]


def _text_arm(rows: list[dict], dense: dict[str, dict]) -> TextArm:
    kl = {r["unit"]: np.asarray(r["kl"], float) for r in rows}
    tokens = [len(row) for row in kl.values()]
    everything = np.concatenate(list(kl.values()))
    p95, p99, greatest = percentiles(everything, (95, 99, 100))
    common = [r for r in rows if r["unit"] in dense]  # an interrupted run may have measured fewer rows
    change = math.nan
    if common:
        change = math.expm1(min(_mean_nll(common) - _mean_nll([dense[r["unit"]] for r in common]), 700))
    live = _mean(rows, "live_tokens")
    return TextArm(
        arm_name(rows[0]),
        rows[0]["policy"],
        live,
        _mean(rows, "length") / live if live else math.inf,
        _mean(rows, "nominal_cr"),
        bootstrap_mean([row.mean() for row in kl.values()], tokens),
        p95,
        p99,
        greatest,
        math.exp(min(_mean_nll(rows), 700)),
        change,
        bootstrap_mean([r["agree"] for r in rows], tokens),
        kl,
    )


def _budget_tokens(budget: str, length: float) -> int | None:
    """Live tokens that a budget means in a row of `length`: "256" is 256, "cr4" a quarter of the row."""
    number = budget.removeprefix("cr")
    try:
        value = float(number)
    except ValueError:
        return None
    if not 0 < value < math.inf:
        return None
    return max(1, round(length / value if budget != number else value))


def _merged(budgets: set[int]) -> dict[int, int]:
    """Budget -> the one it is shown under: those within 3% are the same ("341" and "cr3" of 1024)."""
    shown = {}
    for budget in sorted(budgets):
        last = next(reversed(shown.values()), None)
        shown[budget] = last if last and budget <= 1.03 * last else budget
    return shown


def _nearest(budgets: set[int], live_tokens: float) -> int | None:
    """The budget that an arm without one may be compared under: at most a quarter off, else its own."""
    live = max(1, round(live_tokens))
    near = min(budgets, key=lambda budget: abs(math.log(budget / live)), default=None)
    return near if near is None or 0.8 < near / live < 1.25 else live


def _mean_nll(rows: list[dict]) -> float:
    return float(np.mean(np.concatenate([np.asarray(r["nll"], float) for r in rows])))


def _mean(rows: list[dict], key: str) -> float:
    return float(np.mean([r[key] for r in rows]))


def _accuracy(rows: list[dict]) -> Interval:
    """Over problems: several chains of one problem depend on each other, so their mean is one observation."""
    problems = _grouped(rows, problem_of).values()
    return wilson(sum(_mean(chains, "score") for chains in problems), len(problems))


def _has_cell(record: dict) -> bool:
    groups = record.get("groups") or {}
    return all(_is_number(groups.get(key)) for key in ("length", "depth"))


def _grouped(records: list[dict], key: Callable[[dict], Any]) -> dict[Any, list[dict]]:
    groups = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups


def _kind(record: dict) -> str:
    return record["task"] if record["task"] in TEXT_TASKS else "answers"


def _wrong(record: dict) -> str:
    """Why a record cannot be shown, or ""."""
    for key in ("task", "policy", "budget", "unit"):
        if not isinstance(record[key], str):
            return f"{key} is not text"
    where = f"{record['task']} of {arm_name(record)}"
    for name, kind in FIELDS[_kind(record)].items():
        if not FITS[kind](record.get(name)):
            return f"{name} of {where} is not {kind}"
    if record["task"] == "text" and len(record["kl"]) != len(record["nll"]):
        return f"{where} has {len(record['kl'])} values of KL but {len(record['nll'])} of the log-likelihood"
    if record["task"] == "kept":
        pieces, length = record.get("pieces"), int(record["length"])
        if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
            return f"pieces of {where} is not a list of texts"
        if {len(pieces), len(record["kept"]), len(record["live_by_position"])} != {length}:
            return f"{where} does not have {length} pieces, kept and live_by_position"
    if _kind(record) == "answers" and not 0 <= record["score"] <= 1:
        return f"score of {where} is not within 0 and 1"
    if _kind(record) == "answers" and not (
        record.get("answer_logprob") is None or _is_number(record["answer_logprob"])
    ):
        return f"answer_logprob of {where} is not a number"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_numbers(value: Any, dimensions: int = 1) -> bool:
    """At least one number, in a list, or in a list of lists of equal length."""
    try:
        array = np.asarray(value)
    except ValueError:
        return False
    return isinstance(value, list) and array.dtype.kind in "iuf" and array.ndim == dimensions and array.size > 0


FITS: dict[str, Callable[[Any], bool]] = {
    NUMBER: _is_number,
    COUNT: lambda value: _is_number(value) and 1 <= value < math.inf,
    NUMBERS: _is_numbers,
    TABLE: lambda value: _is_numbers(value, 2),
    TEXT: lambda value: isinstance(value, str),
}
