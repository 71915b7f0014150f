"""One run of the command `hyperscale`: each configuration answers each problem with several samples, and one record
adds up their costs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dms_jax.evaluation.answer_measure import (
    AnswerMeasure,
    Group,
    Sampling,
    answer_setup,
    check_calibration,
    group_problems,
    other_problems,
    sample_answers,
)
from dms_jax.evaluation.evaluation_run import digest, dtype_name, load_model, open_results
from dms_jax.evaluation.methods import DENSE, Calibrator, Method, check_budget, check_learned, parse_methods
from dms_jax.evaluation.options import HyperscaleOptions
from dms_jax.evaluation.result_records import HYPERSCALE, AnswerRecord, HyperscaleRecord
from dms_jax.evaluation.results import ResultsFile
from dms_jax.evaluation.scaling import Configuration
from dms_jax.tasks.problem import Problem, Task, TaskOptions
from dms_jax.tasks.registry import TASKS
from dms_jax.tasks.votes import majority_vote

FIXED = ("temperature", "top_p", "chunk", "seed", "count")  # options that may not change within one file


def measure(options: HyperscaleOptions) -> None:
    """Append the measurements that the results file lacks. Raises ConfigError."""
    model, tokenizer = load_model(options)
    task_options = TaskOptions(
        count=options.count,
        seed=options.seed,
        lengths=options.lengths,
        data=options.data,
        haystack=options.haystack,
        run_code=options.run_code,
    )
    task = TASKS[options.task]
    count_tokens = lambda text: len(tokenizer.encode(text))
    problems = task.problems(task_options, count_tokens)
    methods = parse_methods(options.policies, "cr2")
    policies = list(dict.fromkeys(method.policy for method in methods))
    check_learned(model, methods, options.model)
    fixed = {key: getattr(options, key) for key in FIXED} | {"dtype": dtype_name(model)}
    shared = AnswerMeasure(model, tokenizer, Calibrator(model), Sampling(), options.batch, options.chunk)
    pairs = [
        (configuration, policy)
        for configuration in options.configs
        for policy in (policies if configuration.cr > 1 else [DENSE])
        if configuration.cr == 1 or policy != DENSE
    ]
    # All are prepared before the first is measured, so that an impossible one is refused at once.
    others = []
    if any(_method(*pair).needs_calibration for pair in pairs):
        others = other_problems(task, task_options, options.calibration_data, count_tokens, problems)
    plans = [_plan(shared, options, task, (problems, others), *pair) for pair in pairs]
    file = open_results(options.model, model, options.output, fixed | {f"problems:{task.name}": digest(repr(problems))})
    with tqdm(total=len(pairs) * len(problems), desc=task.name, unit="problem", disable=None) as bar:
        for plan in plans:
            bar.set_postfix_str(f"{plan.method.policy} {plan.configuration}")
            for group in plan.groups:
                _measure_group(plan, file, group, bar.update)
    shared.clock.close()


class Plan(NamedTuple):
    """One configuration under one policy, with the prompts of its problems."""

    run: AnswerMeasure
    configuration: Configuration
    method: Method
    groups: list[Group]


def _plan(
    shared: AnswerMeasure,
    options: HyperscaleOptions,
    task: Task,
    problems: tuple[list[Problem], list[Problem]],
    configuration: Configuration,
    policy: str,
) -> Plan:
    """Prepare one configuration, given the problems to measure and others. Raises ConfigError if its compression ratio
    is impossible for a prompt."""
    sampling = Sampling(configuration.samples, options.temperature, options.top_p, options.seed)
    run = replace(shared, sampling=sampling, batch_size=max(1, options.batch // configuration.samples))
    measured, others = problems
    shortened = [replace(problem, max_new_tokens=configuration.new_tokens) for problem in measured]
    method = _method(configuration, policy)
    groups = group_problems(run, task, shortened, others)
    for group in groups:
        check_budget(run.model, method, group.length)
    check_calibration(method, groups, "--calibration-data FILE")
    return Plan(run, configuration, method, groups)


def _method(configuration: Configuration, policy: str) -> Method:
    return Method(policy, f"cr{configuration.cr:g}" if configuration.cr > 1 else "")


def _measure_group(
    plan: Plan,
    file: ResultsFile,
    group: Group,
    on_problems: Callable[[int], Any],
) -> None:
    run, method, samples = plan.run, plan.method, plan.configuration.samples
    name, budget = HYPERSCALE + group.task.name, str(plan.configuration)
    for problems, prompts in group.batches(run.batch_size):
        if any((name, method.policy, budget, problem.unit) not in file.done for problem in problems):
            setup = answer_setup(run, group, method, file.records_of(name, "dms", budget))
            answers = sample_answers(run, group, method, setup, problems, prompts)
            for i, problem in enumerate(problems):
                record = combined(name, budget, problem, answers[i * samples : (i + 1) * samples])
                if record.key not in file.done:
                    file.append(record)
        on_problems(len(problems))


def combined(task: str, budget: str, problem: Problem, samples: list[AnswerRecord]) -> HyperscaleRecord:
    """Combine all samples of a problem into one record. Costs are added up. A majority vote elects the answer; for
    code, a sample that passes is elected."""
    scores = [sample.score for sample in samples]
    total = lambda name: float(sum(getattr(sample, name) for sample in samples))
    return HyperscaleRecord(
        task=task,
        policy=samples[0].policy,
        budget=budget,
        unit=problem.unit,
        score=max(scores) if problem.tests else scores[majority_vote([sample.extracted for sample in samples])],
        live_tokens=float(np.mean([sample.live_tokens for sample in samples])),
        peak_live=total("peak_live"),
        realised_cr=float(np.mean([sample.realised_cr for sample in samples])),
        kv_reads=total("kv_reads"),
        groups=problem.groups,
        new_tokens=total("new_tokens"),
        prefill_seconds=total("prefill_seconds"),
        decode_seconds=total("decode_seconds"),
        scores=scores,
        texts=[sample.text for sample in samples],
    )
