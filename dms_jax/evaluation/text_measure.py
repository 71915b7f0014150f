"""Rows of given text, and what the tasks of `text_tasks` share when they measure on them: batches, setups and the
results file."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dms_jax.errors import ConfigError
from dms_jax.evaluation.methods import TRAINED, Calibrator, Method, Setup
from dms_jax.evaluation.result_records import TextRecord
from dms_jax.evaluation.results import ResultsFile
from dms_jax.hf.hf_tokenizer import Tokenizer
from dms_jax.models.decoder import Decoder


@dataclass(frozen=True)
class Domain:
    """Rows [rows T] of one text: those to measure on, and those after them, on which thresholds are calibrated."""

    name: str
    rows: np.ndarray
    calibration: np.ndarray


def cut_domain(name: str, ids: np.ndarray, begin: np.ndarray, length: int, rows: int, calibration_rows: int) -> Domain:
    """Cut a stream of tokens into rows of `length`, each of which begins with `begin` (bos, if the model expects it).
    Raises ConfigError if the text is too short."""
    num_rows, take = rows + calibration_rows, length - len(begin)
    if len(ids) < num_rows * take:
        fitting, shorter = max(0, len(ids) // take - calibration_rows), len(ids) // (1 + calibration_rows) // 16 * 16
        if fitting:
            way_out = f"use --rows {fitting}"
        else:
            way_out = f"use --length {shorter} --rows 1" if shorter else "use a smaller --chunk and --length"
        needed = f"{rows} rows of {length}" + (f" and {calibration_rows} for calibration" if calibration_rows else "")
        raise ConfigError(
            f"the text {name} has {len(ids)} tokens, but {needed} take {num_rows * take}; {way_out}, or give more text"
        )
    cut = ids[: num_rows * take].reshape(num_rows, take).astype(np.int32)
    cut = np.concatenate([np.repeat(begin[None].astype(np.int32), num_rows, axis=0), cut], axis=1)
    return Domain(name, cut[:rows], cut[rows:])


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a domain."""

    domain: Domain
    start: int
    size: int  # rows to compute; the last batch of a domain may have fewer
    units: list[str]

    @property
    def rows(self) -> np.ndarray:
        """Rows [size T]. If the text has fewer, the last one is repeated, so that one compiled program serves all."""
        rows = self.domain.rows[self.start : self.start + self.size]
        return np.concatenate([rows, np.repeat(rows[-1:], self.size - len(rows), axis=0)])

    @property
    def key(self) -> tuple[str, int]:
        return self.domain.name, self.start


@dataclass(frozen=True)
class TextMeasure:
    """The model, the rows and the settings that all tasks on given text share."""

    model: Decoder
    tokenizer: Tokenizer
    domains: list[Domain]
    calibrator: Calibrator
    file: ResultsFile
    batch_size: int
    chunk: int  # tokens between two rankings
    greedy_tokens: int  # that the task "greedy" generates for each row
    # (task, batch) -> what the dense model computed, with which every method is compared
    dense_results: dict[tuple[str, tuple[str, int]], Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(len(domain.rows) for domain in self.domains)

    def batches(self) -> Iterator[Batch]:
        size = min(self.batch_size, max(len(domain.rows) for domain in self.domains))
        for domain in self.domains:
            for start in range(0, len(domain.rows), size):
                stop = min(start + size, len(domain.rows))
                yield Batch(domain, start, size, [f"{domain.name}/{i}" for i in range(start, stop)])

    def missing(self, task: str, method: Method, units: list[str]) -> list[str]:
        """Return the units for which the results file has no measurement yet."""
        return [unit for unit in units if (task, method.policy, method.budget, unit) not in self.file.done]

    def setup(self, method: Method, domain: Domain) -> Setup:
        def dms_live_tokens() -> float | None:
            trained = [
                r.live_tokens
                for r in self.file.records_of("text", "dms", TRAINED)
                if isinstance(r, TextRecord) and r.domain == domain.name
            ]
            return float(np.mean(trained)) if trained and method.budget == TRAINED else None

        length = domain.rows.shape[1]
        return self.calibrator.setup(method, length, domain.name, lambda: domain.calibration, dms_live_tokens)
