"""One call of `infer.evaluate`: the model, the arms, the file of results, and the tables at the end."""

import argparse
import hashlib
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from tqdm import tqdm

import dms_jax
from dms_jax.commands.option_values import numbers
from dms_jax.engine.decoding import check_ids
from dms_jax.errors import ConfigError
from dms_jax.evaluation.answer_measure import AnswerMeasure, Group, Sampling
from dms_jax.evaluation.arms import LEARNED, PROMPT, TRAINED, Settings, check_arm, check_learned, parse_arms
from dms_jax.evaluation.results import ResultsFile
from dms_jax.evaluation.text_measure import TextMeasure, cut_domain
from dms_jax.hf.cache_file import identity
from dms_jax.hf.hf_tokenizer import Tokenizer, prompt_ids
from dms_jax.models.decoder import Decoder
from dms_jax.policies import Quest
from dms_jax.provenance import versions
from dms_jax.tasks.problem import TaskOptions
from dms_jax.tasks.registry import TASKS

DEFAULT_POLICIES = "dense,dms,streaming_llm"
FIXED = (
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
BINDING = ("base_sha256", "evict_head_sha256", "dms")  # what has to be the same for results to stand in one file


class EvaluationRun:
    """Raises ConfigError, before anything is measured where it can."""

    def __init__(
        self, options: argparse.Namespace, tasks: list[str], texts: dict[str, str], data: dict[str, str], haystack: str
    ):
        self.options, self.tasks = options, tasks
        self.model, self.tokenizer = load_model(options)
        if self.model.config.dms is None and not options.policies:
            raise ConfigError(
                f"{options.model} has no eviction policy; give a retrofitted folder, --adapter FILE, or --policies with --budgets"
            )
        self.arms = parse_arms(options.policies or DEFAULT_POLICIES, options.budgets)
        check_learned(self.model, (arm.policy for arm in self.arms), options.model)
        if options.chunk > (page := Quest.page_size) and (quest := [arm for arm in self.arms if arm.policy == "quest"]):
            raise ConfigError(f"{quest[0]} chooses pages in chunks of at most a page; use --chunk {page} or less")
        limit, name = self.model.config.context_limit()
        if texts and options.length > limit:
            raise ConfigError(
                f"--length {options.length} is beyond this model's {name} of {limit}; use --length {limit // options.chunk * options.chunk}"
            )
        begin = prompt_ids(self.tokenizer, "")
        vocab_size, sizes = self.model.config.vocab_size, (options.length, options.rows, options.calibration_rows)
        ids = {name: check_ids(self.tokenizer.encode(text), vocab_size) for name, text in texts.items()}
        self.domains = [cut_domain(name, row, begin, *sizes) for name, row in ids.items()]
        lengths, depths = numbers(options.lengths, int, "--lengths"), numbers(options.depths, float, "--depths")
        count_tokens: Callable[[str], int] = lambda text: len(self.tokenizer.encode(text))
        self.problems = {
            name: TASKS[name].problems(
                TaskOptions(
                    options.count,
                    options.seed,
                    lengths,
                    depths,
                    data.get(name, ""),
                    haystack,
                    options.max_new_tokens,
                    options.run_code,
                ),
                count_tokens,
            )
            for name in tasks
            if name in TASKS
        }
        sampling = Sampling(options.chains, options.temperature, options.top_p, options.seed)
        settings = Settings(self.model)
        # Arms, tasks and texts may be added to a file later; what a measurement means may not change.
        fixed = {key: getattr(options, key) for key in FIXED} | {"dtype": str(self.model.embed[...].dtype)}
        fixed |= {f"text:{name}": digest(text) for name, text in texts.items()} | (
            {"haystack": digest(haystack)} if haystack else {}
        )
        fixed |= {f"problems:{name}": digest(repr(problems)) for name, problems in self.problems.items()}
        self.file = open_results(options, self.model, options.output or _default_output(options.model), fixed)
        if texts:
            self._check_arms(options.length, text="text" in tasks)
        self.text = TextMeasure(self.model, self.domains, settings, self.file, options.batch, options.chunk)
        self.answers = AnswerMeasure(
            self.model, self.tokenizer, settings, self.file, sampling, options.batch, options.chunk
        )
        self.groups: dict[str, list[Group]] = {
            name: self.answers.groups(TASKS[name], problems) for name, problems in self.problems.items()
        }

        for found in self.groups.values():
            for group in found:
                self._check_arms(group.length)

    def _check_arms(self, length: int, text: bool = False) -> None:
        for arm in self.arms:
            check_arm(self.model, arm, length)
            if text and arm.policy.startswith(PROMPT):
                raise ConfigError(
                    f"--policies {arm.policy}: prompt compression ranks once, after a prompt; it does not apply to --tasks text"
                )
            if text and arm.policy in LEARNED and arm.budget != TRAINED and not self.options.calibration_rows:
                raise ConfigError(f"{arm} is met by a threshold, which needs --calibration-rows 1 or more")

    def run(self) -> None:
        for name in self.tasks:
            rows = (
                sum(len(domain.rows) for domain in self.domains)
                if name in ("text", "greedy")
                else len(self.problems.get(name, ()))
            )
            with tqdm(total=rows * len(self.arms), desc=name, unit="row", disable=None if rows else True) as bar:
                for arm in self.arms:
                    bar.set_postfix_str(str(arm))
                    if name == "text":
                        self.text.run(arm, bar.update)
                    elif name == "greedy":
                        self.text.greedy(arm, self.options.greedy_tokens, bar.update)
                    elif name == "kept":
                        self.text.kept(arm, self.tokenizer)
                    else:
                        for group in self.groups[name]:
                            self.answers.run(TASKS[name], group, arm, bar.update)


def load_model(options: argparse.Namespace) -> tuple[Decoder, Tokenizer]:
    """Of --model and --adapter; fp32 on a CPU, else bf16."""
    tokenizer = dms_jax.load_tokenizer(options.model)
    model = dms_jax.load(options.model, dtype=jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return (dms_jax.load_adapter(model, options.adapter) if options.adapter else model), tokenizer


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_results(options: argparse.Namespace, model: Decoder, path: str, fixed: dict) -> ResultsFile:
    """The file of results of this model. Raises ConfigError when it is another's, or was measured with other `fixed` options."""
    return ResultsFile(path, {**versions(), "model": options.model, **identity(model)}, fixed, BINDING)


def _default_output(model: str) -> str:
    """In the model's folder; next to a file, in the working directory for a hub id."""
    folder = model if os.path.isdir(model) else os.path.dirname(model) if os.path.isfile(model) else ""
    return os.path.join(folder, "evaluation.jsonl")
