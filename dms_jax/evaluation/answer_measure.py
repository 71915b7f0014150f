"""Measure tasks with answers. For each method, a prompt is prefilled once and answered in one or more samples, which
are scored; the log-probability of the reference answer is measured as well.

The cost of a sample is counted as in the paper (arXiv:2506.05345, section 4): the pairs that the attention of its
generated tokens reads, and the maximum number of pairs held at once. Both are per KV head, averaged over layers and
heads.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

import dms_jax
from dms_jax.core.compact_cache import CompactCache
from dms_jax.core.sampling import token_logprobs
from dms_jax.engine.cache_capacity import round_up
from dms_jax.engine.decoding import init_cache, prefill
from dms_jax.engine.generation import Generation
from dms_jax.engine.stop_ids import end_ids
from dms_jax.engine.stopwatch import Clock
from dms_jax.engine.text_stream import trim_at_stop
from dms_jax.errors import ConfigError
from dms_jax.evaluation.methods import Calibrator, Method, Setup, ranked_pairs
from dms_jax.evaluation.result_records import AnswerRecord, Record, ScoredRecord
from dms_jax.evaluation.results import ResultsFile
from dms_jax.hf.hf_tokenizer import Tokenizer, prompt_ids
from dms_jax.models.decoder import Decoder
from dms_jax.policies.prompt_compression import compress_prompt
from dms_jax.tasks.problem import Problem, Task, TaskOptions

CALIBRATION_ROWS, CALIBRATION_PROBLEMS = 2, 4  # generated prompts: as many problems of each length and depth


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    samples: int = 1  # per problem
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Group:
    """Problems of one length, which share a budget in pairs and a compiled program."""

    name: str
    task: Task
    problems: list[Problem]
    prompts: list[np.ndarray]
    length: int  # tokens of the longest prompt and its answer
    new_tokens: int
    longest_answer: int  # tokens of the longest reference
    calibration: list[np.ndarray]  # prompts with answers of other problems of this length

    def batches(self, size: int) -> Iterator[tuple[list[Problem], list[np.ndarray]]]:
        for start in range(0, len(self.problems), size):
            yield self.problems[start : start + size], self.prompts[start : start + size]


@dataclass(frozen=True)
class AnswerMeasure:
    """The model and the settings that all groups and methods of one run share."""

    model: Decoder
    tokenizer: Tokenizer
    calibrator: Calibrator
    sampling: Sampling
    batch_size: int  # prompts
    chunk: int  # tokens between two rankings
    clock: Clock = field(default_factory=Clock)


def other_problems(
    task: Task, options: TaskOptions, data: str, count_tokens: Callable[[str], int], problems: list[Problem]
) -> list[Problem]:
    """Return problems on which thresholds and budgets of heads may be calibrated, because they are not measured.

    They come from the file `data`, or else from what `options` leave of the task. There may be none.
    """
    if data:
        options = replace(options, count=CALIBRATION_PROBLEMS, data=data)
    else:
        options = replace(options, count=options.count + CALIBRATION_PROBLEMS)
    measured = {problem.prompt for problem in problems}
    return [problem for problem in task.problems(options, count_tokens) if problem.prompt not in measured]


def check_calibration(method: Method, groups: list[Group], option: str) -> None:
    """Refuse a method that must be calibrated on problems of which there are none; `option` names a file of them."""
    for group in groups:
        if method.needs_calibration and not group.calibration:
            raise ConfigError(
                f"{method} must be calibrated on problems that are not measured, but all problems of "
                f"{group.task.name} are; use a smaller --count, or give others with {option}"
            )


def group_problems(run: AnswerMeasure, task: Task, problems: list[Problem], others: list[Problem]) -> list[Group]:
    """Group the problems by the prompt length that they state; those that state none form one group. The `others` are
    for calibration. Raises ConfigError for prompts beyond the model's context."""
    prompts = [_prompt_ids(run.tokenizer, problem) for problem in problems]
    limit = run.model.config.context_limit()[0]
    groups = []
    for label in dict.fromkeys(problem.groups.get("length", "") for problem in problems):
        members = [i for i, problem in enumerate(problems) if problem.groups.get("length", "") == label]
        new_tokens = max(problems[i].max_new_tokens for i in members)
        longest = max(members, key=lambda i: len(prompts[i]))
        length = len(prompts[longest]) + new_tokens
        if length > limit:
            raise ConfigError(
                f"{task.name}/{problems[longest].unit} must fit into this model's context of {limit} tokens, "
                f"but takes {length} with its answer; use shorter prompts or answers"
            )
        groups.append(
            Group(
                name=f"{task.name}/{label}",
                task=task,
                problems=[problems[i] for i in members],
                prompts=[prompts[i] for i in members],
                length=length,
                new_tokens=new_tokens,
                longest_answer=max(len(run.tokenizer.encode(problems[i].answer)) for i in members),
                calibration=[
                    np.append(_prompt_ids(run.tokenizer, other), run.tokenizer.encode(other.answer)).astype(np.int32)
                    for other in others
                    if other.groups.get("length", "") == label
                ],
            )
        )
    return groups


def measure_answers(
    run: AnswerMeasure, file: ResultsFile, groups: list[Group], method: Method, on_problems: Callable[[int], Any]
) -> None:
    """Append the answers of one method that the file lacks. Calls `on_problems` with the number of finished
    problems."""
    for group in groups:
        for problems, prompts in group.batches(run.batch_size):
            units = [
                unit_of(problem, i, run.sampling.samples) for problem in problems for i in range(run.sampling.samples)
            ]
            if any((group.task.name, method.policy, method.budget, unit) not in file.done for unit in units):
                setup = answer_setup(run, group, method, file.records_of(group.task.name, "dms", method.budget))
                for record in sample_answers(run, group, method, setup, problems, prompts):
                    if record.key not in file.done:
                        file.append(record)
            on_problems(len(problems))


def unit_of(problem: Problem, sample: int, samples: int) -> str:
    return f"{problem.unit}#{sample}" if samples > 1 else problem.unit


def answer_setup(run: AnswerMeasure, group: Group, method: Method, dms_records: list[Record]) -> Setup:
    """Return the policy and threshold for a group.

    Unless its budget is a number of pairs, a method keeps as many live tokens as dms did according to `dms_records`.
    The ratio alone would not ensure that, because prompts and answers differ in length.
    """
    units = {problem.unit for problem in group.problems}

    def dms_live_tokens() -> float | None:
        mine = [r.live_tokens for r in dms_records if isinstance(r, ScoredRecord) and r.problem_id in units]
        return float(np.mean(mine)) if mine and not method.budget.isdecimal() else None

    def calibration_rows() -> np.ndarray:
        """Cut rows from other problems, which are repeated if they are too short."""
        stream = np.concatenate(group.calibration)
        return np.resize(stream, CALIBRATION_ROWS * group.length).reshape(CALIBRATION_ROWS, group.length)

    return run.calibrator.setup(method, group.length, group.name, calibration_rows, dms_live_tokens)


class Answered(NamedTuple):
    """A batch of B prompts with `samples` answers each, the answers to a prompt next to each other."""

    generation: Generation
    answer_logprobs: list[float | None]  # [B]
    prompt_tokens: list[int]  # [B]
    prefill_seconds: float  # per answer
    decode_seconds: float


def sample_answers(
    run: AnswerMeasure,
    group: Group,
    method: Method,
    setup: Setup,
    problems: list[Problem],
    prompts: list[np.ndarray],
) -> list[AnswerRecord]:
    """Answer some problems of a group. Returns one record per sample, in the order of the problems; writes nothing."""
    answered, samples = _answered(run, group, setup, problems, prompts), run.sampling.samples
    out, records = answered.generation, []
    for row, (b, sample) in enumerate(itertools.product(range(len(problems)), range(samples))):
        problem, live = problems[b], float(out.live_pairs[row])
        text = _answer_text(run, problem, out.tokens[row])
        records.append(
            AnswerRecord(
                task=group.task.name,
                policy=method.policy,
                budget=method.budget,
                unit=unit_of(problem, sample, samples),
                problem=problem.unit,
                score=float(group.task.score(problem, text)),
                extracted=group.task.extract(text),
                answer_logprob=answered.answer_logprobs[b],
                text=text,
                prompt_tokens=answered.prompt_tokens[b],
                new_tokens=len(out.tokens[row]),
                finish_reason=out.finish_reasons[row],
                live_tokens=live,
                peak_live=float(max(answered.prompt_tokens[b], live)) if method.compresses_prompt else live,
                realised_cr=float(out.realised_cr[row]),
                kv_reads=float(out.pairs_read[row]),
                groups=problem.groups,
                threshold=setup.threshold,
                prefill_seconds=answered.prefill_seconds,
                decode_seconds=answered.decode_seconds,
            )
        )
    return records


def _answered(
    run: AnswerMeasure, group: Group, setup: Setup, problems: list[Problem], prompts: list[np.ndarray]
) -> Answered:
    clock, before = run.clock, dict(run.clock.seconds)
    # Copies of the last prompt fill up the batch, so that all batches have one shape and share a compiled program.
    rows = prompts + [prompts[-1]] * (min(run.batch_size, len(group.problems)) - len(prompts))
    clock.start()
    cache, last = _prefilled(run, rows, group, setup)
    jax.block_until_ready(cache)
    clock.lap("prefill")
    logprobs: list[float | None] = [None] * len(problems)
    if group.task.measures_answer:
        logprobs = _answer_logprobs(run, problems, rows, cache, last, setup.threshold)
    clock.start()
    generation = _generated(run, group, setup, problems, rows, cache)
    clock.lap("decode")
    prefill_seconds, decode_seconds = (
        (clock.seconds[phase] - before[phase]) / (len(rows) * run.sampling.samples) for phase in ("prefill", "decode")
    )
    return Answered(generation, logprobs, [len(row) for row in rows], prefill_seconds, decode_seconds)


def _generated(
    run: AnswerMeasure,
    group: Group,
    setup: Setup,
    problems: list[Problem],
    rows: list[np.ndarray],
    cache: CompactCache,
) -> Generation:
    """Continue the last token of each prompt, `samples` times."""
    samples, padding = run.sampling.samples, len(rows) - len(problems)
    seeds = tuple(_seed(run, group.task, problem, i) for problem in problems for i in range(samples))
    config = dms_jax.GenerationConfig(
        max_new_tokens=group.new_tokens,
        temperature=run.sampling.temperature,
        top_p=run.sampling.top_p,
        threshold=setup.threshold,
        seed=seeds + (0,) * (padding * samples),
        chunk_size=run.chunk,
        stop_strings=tuple(dict.fromkeys(stop for problem in problems for stop in problem.stop_strings)),
    )
    forked = dms_jax.fork(cache, samples) if samples > 1 else cache
    begin = [row[-1:] for row in rows for _ in range(samples)]
    return dms_jax.generate(run.model, begin, config, tokenizer=run.tokenizer, cache=forked)


def _seed(run: AnswerMeasure, task: Task, problem: Problem, sample: int) -> int:
    """Return the seed of a sample, which does not depend on the rest of its batch."""
    return zlib.crc32(f"{run.sampling.seed}/{task.name}/{problem.unit}#{sample}".encode())


def _answer_text(run: AnswerMeasure, problem: Problem, tokens: np.ndarray) -> str:
    """Decode a generated answer up to its end-of-text token or its first stop string."""
    ended = tokens.size and int(tokens[-1]) in end_ids(run.model.config, run.tokenizer)
    text = run.tokenizer.decode(tokens[:-1] if ended else tokens)
    return trim_at_stop(text, problem.stop_strings)


def _prompt_ids(tokenizer: Tokenizer, problem: Problem) -> np.ndarray:
    if problem.as_chat:
        return np.asarray(tokenizer.encode_chat([{"role": "user", "content": problem.prompt}], reply=True), np.int32)
    return np.asarray(prompt_ids(tokenizer, problem.prompt), np.int32)


def _prefilled(
    run: AnswerMeasure, rows: list[np.ndarray], group: Group, setup: Setup
) -> tuple[CompactCache, np.ndarray]:
    """Prefill all of each prompt but its last token. Returns the cache and the last tokens, with which answers
    begin."""
    lengths = np.array([len(row) - 1 for row in rows])
    padded = np.zeros((len(rows), max(lengths.max(), 1)), np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row) - 1] = row[:-1]
    max_pairs = ranked_pairs(setup.policy)
    length = round_up(group.length + group.longest_answer)
    cache = init_cache(run.model, len(rows), min(max_pairs or length, length), policy=setup.policy)
    chunk = None if max_pairs is None else run.chunk
    _, cache = prefill(run.model, cache, padded, lengths, chunk, threshold=setup.threshold, last_only=True, donate=True)
    if setup.compresses_prompt:
        new = round_up(max(group.new_tokens, group.longest_answer) + 1)
        most = setup.policy.method.slot_bounds().max  # pyrefly: ignore[missing-attribute]  # PromptCompression
        cache = compress_prompt(cache, most + new)
    return cache, np.array([row[-1] for row in rows], np.int32)


def _answer_logprobs(
    run: AnswerMeasure,
    problems: list[Problem],
    rows: list[np.ndarray],
    cache: CompactCache,
    last: np.ndarray,
    threshold: float,
) -> list[float | None]:
    """Return log p of each whole reference answer, teacher-forced after its prompt."""
    ids = [np.asarray(run.tokenizer.encode(problem.answer), np.int32) for problem in problems]
    ids += [ids[-1]] * (len(rows) - len(ids))
    width = max(map(len, ids))
    inputs, targets = np.zeros((2, len(rows), width), np.int32)
    for source, target, first, answer in zip(inputs, targets, last, ids, strict=True):
        source[0], source[1 : len(answer)] = first, answer[:-1]
        target[: len(answer)] = answer
    lengths = np.array([max(1, len(answer)) for answer in ids])
    logits, _ = prefill(run.model, cache, inputs, lengths, run.chunk, threshold=threshold)
    logprobs = np.asarray(jax.vmap(token_logprobs, (1, 1), 1)(logits, targets))
    some = zip(logprobs[: len(problems)], ids[: len(problems)], strict=True)
    return [float(row[: len(answer)].sum()) for row, answer in some]
