"""One run of the command `evaluate`: `prepare` checks everything that can be checked before the first measurement, and
`measure` does the work."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dms_jax.errors import ConfigError
from dms_jax.evaluation.answer_measure import (
    AnswerMeasure,
    Group,
    Sampling,
    check_calibration,
    group_problems,
    measure_answers,
    other_problems,
)
from dms_jax.evaluation.live_counts import live_counts_of, write_live_counts
from dms_jax.evaluation.methods import Calibrator, Method, check_budget, check_learned, parse_methods
from dms_jax.evaluation.options import CommonOptions, EvaluationOptions
from dms_jax.evaluation.result_records import KeptRecord
from dms_jax.evaluation.results import ResultsFile
from dms_jax.evaluation.text_measure import Domain, TextMeasure, cut_domain
from dms_jax.evaluation.text_tasks import TEXT_TASKS
from dms_jax.hf.cache_file import identity
from dms_jax.hf.hf_tokenizer import Tokenizer, prompt_ids
from dms_jax.hf.open_model import open_model
from dms_jax.models.decoder import Decoder
from dms_jax.models.token_ids import check_ids
from dms_jax.platform_defaults import default_dtype
from dms_jax.policies import Quest
from dms_jax.provenance import versions
from dms_jax.tasks.problem import Problem, TaskOptions
from dms_jax.tasks.registry import TASKS

DEFAULT_POLICIES = "dense,dms,streaming_llm"
BINDING = ("base_sha256", "evict_head_sha256", "dms")  # header entries that all results of one file share
FIXED = (  # options that must not change within one file, because they define what its measurements mean
    "length",
    "rows",
    "calibration_rows",
    "chunk",
    "seed",
    "greedy_tokens",
    "count",
    "max_new_tokens",
    "chains",
    "temperature",
    "top_p",
)


@dataclass(frozen=True)
class Job:
    """One task, ready to measure any method."""

    name: str
    num_rows: int  # rows or problems per method, for the progress bar
    measure: Callable[[Method, Callable[[int], Any]], None]


@dataclass(frozen=True)
class Evaluation:
    methods: list[Method]
    jobs: list[Job]
    file: ResultsFile


def prepare(options: EvaluationOptions) -> Evaluation:
    """Load the model, cut the texts, make the problems and open the results file. Raises ConfigError for settings that
    cannot work."""
    model, tokenizer = load_model(options)
    methods = _methods(options, model)
    domains = _domains(options, model, tokenizer)
    problems, others = _problems(options, tokenizer, any(method.needs_calibration for method in methods))
    calibrator = Calibrator(model)
    sampling = Sampling(options.chains, options.temperature, options.top_p, options.seed)
    answers = AnswerMeasure(model, tokenizer, calibrator, sampling, options.batch, options.chunk)
    groups = {name: group_problems(answers, TASKS[name], found, others[name]) for name, found in problems.items()}
    _check_budgets(options, model, methods, groups)
    file = open_results(options.model, model, options.output, _fixed(options, model, problems))
    text = TextMeasure(model, tokenizer, domains, calibrator, file, options.batch, options.chunk, options.greedy_tokens)
    jobs = []
    # The task "text" comes first, because it measures how many live tokens dms keeps.
    for name in sorted(options.tasks, key=lambda name: name != "text"):
        if name in TEXT_TASKS:
            jobs.append(Job(name, TEXT_TASKS[name].num_rows(text), partial(TEXT_TASKS[name].measure, text)))
        else:
            jobs.append(Job(name, len(problems[name]), partial(measure_answers, answers, file, groups[name])))
    return Evaluation(methods, jobs, file)


def measure(evaluation: Evaluation) -> None:
    """Append the measurements that the results file lacks."""
    for job in evaluation.jobs:
        total = job.num_rows * len(evaluation.methods)
        with tqdm(total=total, desc=job.name, unit="row", disable=None if total else True) as bar:
            for method in evaluation.methods:
                bar.set_postfix_str(str(method))
                job.measure(method, bar.update)


def write_counts(evaluation: Evaluation, options: EvaluationOptions, command: str) -> None:
    """Write what the task `kept` measured on this command's texts to `options.live_counts`."""
    assert options.live_counts is not None  # checked by the caller
    file, units = evaluation.file, [f"{name}/0" for name in options.texts]
    kept = [r for m in evaluation.methods for r in file.records_of("kept", m.policy, m.budget)]
    records = [record for record in kept if isinstance(record, KeptRecord) and record.unit in units]
    texts = {name: digest(text) for name, text in options.texts.items()}
    provenance = {"command": command, "date": time.strftime("%Y-%m-%d", time.gmtime()), "texts": texts}
    provenance |= {name: value for name, value in file.header.items() if name != "model"}
    write_live_counts(options.live_counts, live_counts_of(records, options.model, provenance))


def load_model(options: CommonOptions) -> tuple[Decoder, Tokenizer]:
    """Load the tokenizer, and the model with its adapter in the platform's default dtype."""
    dtype = jnp.dtype(default_dtype())
    return open_model(options.model, options.adapter, dtype, allow_non_finite=options.allow_non_finite)


def open_results(name: str, model: Decoder, path: str, fixed: dict) -> ResultsFile:
    """Begin or continue the results file of the model `name`. Raises ConfigError if the file holds results of another
    model or of other `fixed` options."""
    return ResultsFile(path, {**versions(), "model": name, **identity(model)}, fixed, BINDING)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dtype_name(model: Decoder) -> str:
    return str(model.embed[...].dtype)


def _methods(options: EvaluationOptions, model: Decoder) -> list[Method]:
    if model.config.dms is None and not options.policies:
        raise ConfigError(
            f"--model {options.model} has no eviction policy; "
            "give a retrofitted folder, --adapter FILE, or --policies with --budgets"
        )
    methods = parse_methods(options.policies or DEFAULT_POLICIES, options.budgets)
    check_learned(model, methods, options.model)
    learned = [str(method) for method in methods if method.kind.is_learned]
    if options.live_counts and len(learned) != 1:
        raise ConfigError(
            f"--live-counts takes one learned method, got {', '.join(learned) or 'none'}; use --policies dms"
        )
    for method in methods:
        if method.kind.reads_subset and options.chunk > Quest.page_size:
            raise ConfigError(
                f"--chunk must be at most the page size {Quest.page_size} of {method}, got {options.chunk}; "
                f"use --chunk {Quest.page_size}"
            )
    return methods


def _domains(options: EvaluationOptions, model: Decoder, tokenizer: Tokenizer) -> list[Domain]:
    limit, limit_name = model.config.context_limit()
    if options.texts and options.length > limit:
        raise ConfigError(
            f"--length must be at most this model's {limit_name} of {limit}, got {options.length} "
            f"(the default is 1024); use --length {limit // options.chunk * options.chunk}"
        )
    begin = prompt_ids(tokenizer, "")
    sizes = options.length, options.rows, options.calibration_rows
    ids: dict[str, np.ndarray] = {
        name: check_ids(tokenizer.encode(text), model.config.vocab_size) for name, text in options.texts.items()
    }
    return [cut_domain(name, row, begin, *sizes) for name, row in ids.items()]


def _problems(
    options: EvaluationOptions, tokenizer: Tokenizer, calibrates: bool
) -> tuple[dict[str, list[Problem]], dict[str, list[Problem]]]:
    """Make the problems of each task with answers, and other problems if a method `calibrates` on them."""
    found, others, count_tokens = {}, {}, lambda text: len(tokenizer.encode(text))
    for name in options.tasks:
        if name in TASKS:
            task_options = TaskOptions(
                count=options.count,
                seed=options.seed,
                lengths=options.lengths,
                depths=options.depths,
                data=options.data.get(name, ""),
                haystack=options.haystack,
                max_new_tokens=options.max_new_tokens,
                run_code=options.run_code,
            )
            found[name], others[name] = TASKS[name].problems(task_options, count_tokens), []
            if calibrates:
                data = options.calibration_data.get(name, "")
                others[name] = other_problems(TASKS[name], task_options, data, count_tokens, found[name])
    return found, others


def _fixed(options: EvaluationOptions, model: Decoder, problems: dict[str, list[Problem]]) -> dict[str, Any]:
    """Return the settings that must not change within one file. Methods, tasks and texts may be added to a file."""
    fixed = {key: getattr(options, key) for key in FIXED} | {"dtype": dtype_name(model)}
    fixed |= {f"text:{name}": digest(text) for name, text in options.texts.items()}
    if options.haystack:
        fixed["haystack"] = digest(options.haystack)
    return fixed | {f"problems:{name}": digest(repr(found)) for name, found in problems.items()}


def _check_budgets(
    options: EvaluationOptions, model: Decoder, methods: list[Method], groups: dict[str, list[Group]]
) -> None:
    """Refuse methods that cannot run on the texts or on the prompts."""
    for method in methods:
        if options.texts:
            check_budget(model, method, options.length)
        if options.texts and "text" in options.tasks:
            if method.compresses_prompt:
                raise ConfigError(
                    f"--policies {method.policy}: prompt compression ranks once, after a prompt, "
                    "so it does not apply to --tasks text"
                )
            if method.needs_calibration and not options.calibration_rows:
                what = "budgets of heads" if method.kind.has_budget else "a threshold"
                raise ConfigError(f"{method} needs {what} from calibration rows; use --calibration-rows 1 or more")
        for name, found in groups.items():
            for group in found:
                check_budget(model, method, group.length)
            check_calibration(method, found, f"--calibration-data {name}=FILE")
