"""The options of `evaluate` and of `hyperscale`, as the commands parse them. Imports no JAX."""

from dataclasses import dataclass, field
from typing import Annotated

from dms_jax.config_reader import AtLeast, Range
from dms_jax.evaluation.scaling import Configuration

TopP = Annotated[float, Range(0, 1, exclusive_min=True)]


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The options that both commands have, by their names on the command line; `--help` explains them."""

    model: str
    adapter: str | None = None
    allow_non_finite: bool = False
    count: Annotated[int, AtLeast(1)] = 20
    lengths: tuple[int, ...] = (1024,)
    haystack: str = ""  # content
    run_code: bool | str = False  # or "unconfined"
    batch: Annotated[int, AtLeast(1)] = 8
    chunk: Annotated[int, AtLeast(1)] = 16
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(CommonOptions):
    """The options of `evaluate`."""

    tasks: tuple[str, ...] = ("text",)
    policies: str = ""
    budgets: str = ""
    output: str
    live_counts: str | None = None  # path
    texts: dict[str, str] = field(default_factory=dict)  # name -> content
    length: Annotated[int, AtLeast(2)] = 1024
    rows: Annotated[int, AtLeast(1)] = 16
    calibration_rows: Annotated[int, AtLeast(0)] = 2
    greedy_tokens: Annotated[int, AtLeast(1)] = 64
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    data: dict[str, str] = field(default_factory=dict)  # task -> file or hf: name
    calibration_data: dict[str, str] = field(default_factory=dict)  # the same
    max_new_tokens: Annotated[int, AtLeast(0)] = 0  # 0: the task's own limit
    chains: Annotated[int, AtLeast(1)] = 1
    temperature: Annotated[float, AtLeast(0)] = 0.0
    top_p: TopP = 1.0


@dataclass(frozen=True, kw_only=True)
class HyperscaleOptions(CommonOptions):
    """The options of `hyperscale`."""

    task: str = "gsm8k"
    configs: tuple[Configuration, ...]
    policies: str = "dms"
    output: str = "hyperscale.jsonl"
    data: str = ""
    calibration_data: str = ""
    temperature: Annotated[float, AtLeast(0)] = 0.7
    top_p: TopP = 0.95
