"""Tasks with a right answer: each prompt is prefilled once per arm, then answered in several chains, and its reference scored.

What a chain costs is counted as the paper does (arXiv:2506.05345, section 4): pairs read by the attention of its generated
tokens, and the most pairs held at once; both per KV head, mean over layers and heads.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

import dms_jax
from dms_jax.core.sampling import token_logprobs
from dms_jax.engine.cache_capacity import round_up
from dms_jax.engine.decoding import init_cache, prefill
from dms_jax.engine.stopwatch import Clock
from dms_jax.engine.text_stream import trim_at_stop
from dms_jax.errors import ConfigError
from dms_jax.evaluation.arms import PROMPT, Arm, Setting, Settings
from dms_jax.evaluation.results import ResultsFile, problem_of
from dms_jax.hf.hf_tokenizer import Tokenizer, prompt_ids
from dms_jax.models.decoder import Decoder
from dms_jax.policies import PromptCompression
from dms_jax.policies.prompt_compression import compress_prompt
from dms_jax.tasks.problem import Problem, Task

CALIBRATION_ROWS = 2


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    chains: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Group:
    """Problems of one length, which share a budget in pairs and a program."""

    name: str
    problems: list[Problem]
    prompts: list[np.ndarray]
    length: int  # tokens of the longest prompt and its answer
    new_tokens: int
    longest_answer: int  # tokens of a reference


class AnswerMeasure:
    """Runs arms over groups of problems. `prefix` and `budget` are how the file names task and budget, where a caller writes records of its own."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        settings: Settings,
        file: ResultsFile,
        sampling: Sampling,
        batch: int,
        chunk: int,
        prefix: str = "",
        budget: str = "",
    ):
        self.prefix, self.budget = prefix, budget
        self.model, self.tokenizer, self.settings, self.file = model, tokenizer, settings, file
        self.sampling, self.batch, self.chunk, self.clock = sampling, batch, chunk, Clock()

    def groups(self, task: Task, problems: list[Problem]) -> list[Group]:
        """By prompt length where the task has it, else all together. Raises ConfigError for prompts beyond the model's context."""
        prompts = [self._ids(problem) for problem in problems]
        limit = self.model.config.context_limit()[0]
        found = []
        for label in dict.fromkeys(problem.groups.get("length", "") for problem in problems):
            chosen = [i for i, problem in enumerate(problems) if problem.groups.get("length", "") == label]
            new = max(problems[i].max_new_tokens for i in chosen)
            longest = max(chosen, key=lambda i: len(prompts[i]))
            length = len(prompts[longest]) + new
            if length > limit:
                where = f"{task.name}/{problems[longest].unit}"
                way_out = "use shorter prompts or answers"
                raise ConfigError(
                    f"{where}: {length} tokens with its answer are beyond this model's context of {limit}; {way_out}"
                )
            longest_answer = max(len(self.tokenizer.encode(problems[i].answer)) for i in chosen)
            found.append(
                Group(
                    f"{task.name}/{label}",
                    [problems[i] for i in chosen],
                    [prompts[i] for i in chosen],
                    length,
                    new,
                    longest_answer,
                )
            )
        return found

    def run(self, task: Task, group: Group, arm: Arm, done) -> None:
        """One arm over one group; `done` is called with the number of problems finished."""
        for some, prompts in self.batches(group):
            units = [self.unit(problem, chain) for problem in some for chain in range(self.sampling.chains)]
            if any((task.name, arm.policy, arm.budget, unit) not in self.file.done for unit in units):
                for record in self.answers(task, group, arm, some, prompts):
                    if (task.name, arm.policy, arm.budget, record["unit"]) not in self.file.done:
                        self.file.append(record)
            done(len(some))

    def batches(self, group: Group) -> Iterator[tuple[list[Problem], list[np.ndarray]]]:
        for start in range(0, len(group.problems), self.batch):
            yield group.problems[start : start + self.batch], group.prompts[start : start + self.batch]

    def unit(self, problem: Problem, chain: int) -> str:
        return f"{problem.unit}#{chain}" if self.sampling.chains > 1 else problem.unit

    def _ids(self, problem: Problem) -> np.ndarray:
        if problem.as_chat:
            return np.asarray(
                self.tokenizer.encode_chat([{"role": "user", "content": problem.prompt}], reply=True), np.int32
            )
        return np.asarray(prompt_ids(self.tokenizer, problem.prompt), np.int32)

    def _setting(self, task: Task, group: Group, arm: Arm) -> Setting:
        def held() -> float | None:
            """Prompts and answers differ in length, so a ratio alone would not give the others as much as dms."""
            units = {problem.unit for problem in group.problems}
            mine = [
                r["live_tokens"]
                for r in self.file.of(self.prefix + task.name, "dms", self.budget or arm.budget)
                if problem_of(r) in units
            ]
            return float(np.mean(mine)) if mine and not arm.budget.isdecimal() else None

        def calibration() -> np.ndarray:
            """Rows of this length, out of the prompts themselves, over and over when they are few."""
            stream = np.concatenate(group.prompts)
            return np.resize(stream, CALIBRATION_ROWS * group.length).reshape(CALIBRATION_ROWS, group.length)

        return self.settings.of(arm, group.length, group.name, calibration, held)

    def answers(
        self, task: Task, group: Group, arm: Arm, problems: list[Problem], prompts: list[np.ndarray]
    ) -> list[dict]:
        """A record a chain, the chains of a problem next to each other; nothing is written."""
        setting, before = self._setting(task, group, arm), dict(self.clock.seconds)
        rows = prompts + [prompts[-1]] * (min(self.batch, len(group.problems)) - len(prompts))  # one shape, one program
        self.clock.start()
        cache, last = self._prefilled(rows, group, setting)
        jax.block_until_ready(cache)
        self.clock.lap("prefill")
        answer = (
            self._answer_logprobs(problems, rows, cache, last, setting.threshold)
            if task.measures_answer
            else [None] * len(problems)
        )
        self.clock.start()
        chains, total = self.sampling.chains, len(rows) * self.sampling.chains
        config = dms_jax.GenerationConfig(
            max_new_tokens=group.new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            threshold=setting.threshold,
            seed=self._seeds(task, problems, chains) + (0,) * (total - len(problems) * chains),
            chunk_size=self.chunk,
            stop_strings=tuple(dict.fromkeys(stop for problem in problems for stop in problem.stop_strings)),
        )
        forked = dms_jax.fork(cache, chains) if chains > 1 else cache
        out = dms_jax.generate(
            self.model,
            [row[-1:] for row in rows for _ in range(chains)],
            config,
            tokenizer=self.tokenizer,
            cache=forked,
        )
        self.clock.lap("decode")
        seconds = {phase: (self.clock.seconds[phase] - before[phase]) / total for phase in ("prefill", "decode")}
        records = []
        for b, problem in enumerate(problems):
            for chain in range(chains):
                i = b * chains + chain
                text = trim_at_stop(self.tokenizer.decode(self._shown(out.tokens[i])), problem.stop_strings)
                peak = max(len(rows[b]), out.live_pairs[i]) if arm.policy.startswith(PROMPT) else out.live_pairs[i]
                records.append(
                    {
                        "task": task.name,
                        "policy": arm.policy,
                        "budget": arm.budget,
                        "unit": self.unit(problem, chain),
                        "problem": problem.unit,
                        "score": task.score(problem, text),
                        "extracted": task.extract(text),
                        "answer_logprob": answer[b],
                        "text": text,
                        "prompt_tokens": len(rows[b]),
                        "new_tokens": len(out.tokens[i]),
                        "finish_reason": out.finish_reasons[i],
                        "live_tokens": float(out.live_pairs[i]),
                        "peak_live": float(peak),
                        "realised_cr": float(out.realised_cr[i]),
                        "kv_reads": float(out.pairs_read[i]),
                        "groups": problem.groups,
                        "threshold": setting.threshold,
                        "prefill_seconds": seconds["prefill"],
                        "decode_seconds": seconds["decode"],
                    }
                )
        return records

    def _seeds(self, task: Task, problems: list[Problem], chains: int) -> tuple[int, ...]:
        """Of each chain: the same whatever else runs in its batch."""
        names = [
            f"{self.sampling.seed}/{task.name}/{problem.unit}#{chain}"
            for problem in problems
            for chain in range(chains)
        ]
        return tuple(zlib.crc32(name.encode()) for name in names)

    def _shown(self, tokens: np.ndarray) -> np.ndarray:
        return tokens[:-1] if tokens.size and int(tokens[-1]) in self.model.config.eos_token_ids else tokens

    def _prefilled(self, rows: list[np.ndarray], group: Group, setting):
        """The cache after all of each prompt but its last token, which belongs to the answer's first step."""
        lengths = np.array([len(row) - 1 for row in rows])
        padded = np.zeros((len(rows), max(lengths.max(), 1)), np.int32)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row) - 1] = row[:-1]
        policy = setting.policy
        length = round_up(group.length + group.longest_answer)
        capacity = min(policy.slot_bounds().max or length, length)
        cache = init_cache(self.model, len(rows), capacity, policy=policy)
        chunk = None if isinstance(policy, PromptCompression) or policy.slot_bounds().max is None else self.chunk
        _, cache = prefill(
            self.model, cache, padded, lengths, chunk, threshold=setting.threshold, last_only=True, donate=True
        )
        if isinstance(policy, PromptCompression):
            cache = compress_prompt(
                cache, policy.method.budget + round_up(max(group.new_tokens, group.longest_answer) + 1)
            )
        return cache, np.array([row[-1] for row in rows], np.int32)

    def _answer_logprobs(self, problems, rows, cache, last, threshold) -> list[float]:
        """log p of each whole reference answer, teacher-forced after the prompt."""
        ids = [np.asarray(self.tokenizer.encode(problem.answer), np.int32) for problem in problems]
        ids += [ids[-1]] * (len(rows) - len(ids))
        width = max(map(len, ids))
        padded = np.zeros((len(rows), width), np.int32)
        for target, first, answer in zip(padded, last, ids, strict=True):
            target[0], target[1 : len(answer)] = first, answer[:-1]
        lengths = np.array([max(1, len(answer)) for answer in ids])
        logits, _ = prefill(self.model, cache, padded, lengths, self.chunk, threshold=threshold)
        following = np.zeros((len(rows), width), np.int32)
        for target, answer in zip(following, ids, strict=True):
            target[: len(answer)] = answer
        logprobs = np.asarray(jax.vmap(token_logprobs, (1, 1), 1)(logits, following))
        return [
            float(row[: len(answer)].sum())
            for row, answer in zip(logprobs[: len(problems)], ids[: len(problems)], strict=True)
        ]
