"""Generate text with a compact cache: continue one prompt or a file of prompts, or hold a chat.

    python -m infer.generate --model runs/retrofit/export --prompt "The capital of France is"
    python -m infer.generate --model runs/retrofit/export --prompts questions.jsonl --as-chat --batch 4 \\
        --output answers.jsonl
    python -m infer.generate --model runs/retrofit/export --chat --temperature 0.7 --top-p 0.9

For --prompts, each line of a .txt file is a prompt, and each line of a .jsonl file is an object with "prompt" (text) or
"messages" (a chat). In a --chat, Ctrl-C stops an answer, /reset starts a new conversation, /stats shows the costs so
far, and Ctrl-D ends. Text goes to stdout; a table of speed, compression and memory follows on stderr.
"""

import argparse
import contextlib
import json
import os
import sys
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, get_args

from dms_jax.command import Parser
from dms_jax.commands.option_values import add_inference_mesh, inference_mesh
from dms_jax.config import OVERFLOWS, ImplementationName
from dms_jax.config_reader import meaning_of, range_of
from dms_jax.engine.generation_config import SAMPLED, SAMPLING, GenerationConfig
from dms_jax.errors import ConfigError, naming
from dms_jax.files import check_target
from dms_jax.writer_lock import only_writer

if TYPE_CHECKING:  # both load JAX
    from dms_jax.engine.prompts import Prompt
    from dms_jax.engine.session import Session

NAME = "generate"
MEMORY_AND_LATENCY = ("allocated_bytes", "live_bytes", "dense_bytes", "seconds_to_first_token")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__, compiles=True)
    parser.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder, hub id or .gguf file")
    parser.add_argument("--adapter", metavar="FILE", help="an adapter to load onto the base model")
    parser.add_argument(
        "--allow-non-finite", action="store_true", help="load weights that have NaN or infinities, as they are"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="dtype of weights and cache (default: float32 on a CPU, bfloat16 elsewhere)",
    )
    parser.add_argument(
        "--implementation",
        choices=get_args(ImplementationName),
        default="auto",
        help="implementation of attention; auto is the fastest that was measured on this kind of device (default auto)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="with --prompt, print one JSON object; with --prompts or --chat, print the final table as JSON",
    )
    add_inference_mesh(parser)
    _add_inputs(parser.add_argument_group("input (give exactly one of the first three)"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_cache(parser.add_argument_group("cache"))
    return parser.parse_args(argv)


def _add_inputs(group) -> None:
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        help="one prompt, or - to read it from stdin; its continuation is printed as it is generated",
    )
    group.add_argument("--prompts", metavar="FILE", help="a .txt or .jsonl file of prompts; the results are JSON lines")
    group.add_argument("--chat", action="store_true", help="hold a conversation with stdin, in one cache")
    group.add_argument(
        "--as-chat", action="store_true", help="put each plain prompt into the chat template as a user message"
    )
    group.add_argument("--system", metavar="TEXT", help="the system message of a chat")
    group.add_argument(
        "--allow-control-tokens",
        action="store_true",
        help="read control tokens such as <|im_end|> that the text of a prompt spells as such, not as text",
    )
    group.add_argument(
        "--batch", type=int, default=1, metavar="N", help="prompts of a file that run together (default 1)"
    )
    group.add_argument("--output", metavar="FILE", help="write the results of --prompts to this file instead of stdout")
    group.add_argument(
        "--overwrite", action="store_true", help="replace the files of --output and --save-cache if they exist"
    )


def _add_sampling(group) -> None:
    _add_setting(group, "max_new_tokens")
    for name in SAMPLING:
        _add_setting(group, name, from_model=True)
    group.add_argument(
        "--greedy",
        action="store_true",
        help="choose the likeliest token, without a penalty, whatever generation_config.json says",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="prompt i of a file, or turn i of a chat, draws with seed + i (default 0)",
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop at this text; may be repeated")
    group.add_argument(
        "--ignore-eos", action="store_true", help="do not stop at the end-of-text tokens of model and tokenizer"
    )


def _add_cache(group) -> None:
    group.add_argument(
        "--cache",
        choices=["slots", "pages"],
        help="pages follow the live pairs of each head, slots are as many for all heads of a layer (default: pages "
        "for a dense or learned policy, unless --capacity or --overflow evict is given; on an accelerator only if the "
        "kernel that reads pages is the default or is named by --implementation)",
    )
    group.add_argument(
        "--capacity",
        metavar="N[,N...]",
        help="slots per row and KV head, one number or one per layer (default: enough for all tokens)",
    )
    group.add_argument(
        "--overflow",
        choices=OVERFLOWS,
        help="when a pair finds no room: grow the cache, raise an error, or evict a pair of slots by force (default: "
        "grow for pages; for slots, grow in a chat and with --save-cache, unless --capacity is given, else raise for a "
        "dense cache and evict for any other)",
    )
    group.add_argument("--dense", action="store_true", help="ignore the policy and keep every pair")
    group.add_argument(
        "--policy",
        metavar="NAME[:N]",
        help="another policy than the model's own, with its budget in pairs per KV head: dms_budget:256 (exact budgets "
        "for a learned evict head), tova:256, prompt:tova:256, ...",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="a pair is evicted if its evict logit exceeds this; a lower threshold evicts more (default 0)",
    )
    _add_setting(group, "chunk_size")
    group.add_argument("--save-cache", metavar="FILE", help="save the cache at the end of --prompt or --chat")
    group.add_argument(
        "--load-cache", metavar="FILE", help="continue from a saved cache, of which each prompt of a file gets a copy"
    )


def _add_setting(group, name: str, from_model: bool = False) -> None:
    """Add an option for a field of GenerationConfig, with the type, default, range and meaning of that field.

    `from_model`: the model's generation_config.json comes before the default, so the option itself has none.
    """
    kind = typing.get_type_hints(GenerationConfig, include_extras=True)[name]
    default = getattr(GenerationConfig, name)
    number = int if isinstance(default, int) or default is None else float
    source = "that of generation_config.json, else " if from_model else ""
    text = f"{meaning_of(kind)} ({range_of(kind)}" + (")" if default is None else f"; default {source}{default:g})")
    group.add_argument(
        _option(name),
        type=number,
        default=None if from_model else default,
        metavar="N" if number is int else "X",
        help=text,
    )


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    check(options)
    from dms_jax.engine.prompts import Prompt, check_text, read_prompts

    prompts = read_prompts(options.prompts) if options.prompts else []
    if options.prompt is not None:
        prompts = [Prompt(_from_stdin() if options.prompt == "-" else options.prompt, "--prompt")]
    for name, texts in (("system", [options.system]), ("stop", options.stop)):
        for text in texts:
            check_text(Prompt(text or "", f"--{name}"))
    for prompt in prompts:
        check_text(prompt)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # show "?" for what the terminal cannot show
    targets = [path for path in (options.output, options.save_cache) if path]
    with contextlib.ExitStack() as held:
        for path in targets:
            held.enter_context(only_writer(path, "give another file"))
        _check_targets(options)  # again, since another process may have written a file before the lock
        return _answer(options, prompts)


def _answer(options: argparse.Namespace, prompts: "list[Prompt]") -> int:
    """Load the model and answer the prompts."""
    mesh = inference_mesh(options.mesh, options.batch, f"--batch {options.batch}" if prompts[1:] else "one prompt")
    with mesh, _out_of_memory_advice():
        from dms_jax.engine.chat import chat
        from dms_jax.engine.session import non_finite, open_session

        session = open_session(options)
        broken: list[str] = []  # answers that ended at logits that are not finite
        if options.chat:
            if not options.json:
                session.say_settings()
            chat(session)
        elif options.prompts:
            broken = many(session, prompts)
        else:
            broken = one(session, prompts[0])
    _show_end(session)
    if broken:
        raise ConfigError(non_finite(broken))
    return 0


def _show_end(session: "Session") -> None:
    """Print the settings and the table of costs on stderr, or with --json what stdout does not hold already."""
    options, report = session.options, session.report
    if not options.chat and (options.prompt is not None or not options.json):
        session.say_settings()
    if options.prompt is None or not options.json:
        print(json.dumps(report.numbers() | session.settings()) if options.json else report.table(), file=sys.stderr)


def _from_stdin() -> str:
    """Return the text of stdin, without the line break that ends its last line."""
    if sys.stdin is None:
        raise ConfigError("--prompt - reads stdin, which is closed; give --prompt TEXT, or leave stdin open")
    try:
        text = sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as why:
        raise ConfigError(f"--prompt -: stdin is not valid UTF-8 at byte {why.start}; convert it") from why
    if not text:
        raise ConfigError("--prompt -: stdin is empty; give a text")
    return text


@contextlib.contextmanager
def _out_of_memory_advice() -> Iterator[None]:
    """Report running out of memory, on the host or on the device, as one line that says which options need less."""
    import jax

    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as why:
        if isinstance(why, MemoryError) or "RESOURCE_EXHAUSTED" in str(why):
            raise ConfigError(
                "out of memory; give a smaller --capacity, --batch or --chunk-size, or --dtype bfloat16"
            ) from why
        raise


def check(options: argparse.Namespace) -> None:
    """Check the options, as far as that needs no file and no import."""
    if not options.model:
        raise ConfigError(
            "--model is missing; give a Hugging Face folder, a hub id or a .gguf file, e.g. "
            "--model runs/retrofit/export"
        )
    if (options.prompt is not None) + (options.prompts is not None) + options.chat != 1:
        raise ConfigError("exactly one of --prompt TEXT, --prompts FILE and --chat must be given")
    if options.prompt == "":
        raise ConfigError("--prompt is empty; give a text")
    if options.batch < 1:
        raise ConfigError(f"--batch must be at least 1, got {options.batch}; use --batch 1")
    mode = "prompt" if options.prompt is not None else "prompts" if options.prompts else "chat"
    unused = {
        "output": mode != "prompts",
        "batch": mode != "prompts" and options.batch != 1,
        "as_chat": mode == "chat",
        "save_cache": mode == "prompts",
        "system": mode == "prompt" and not options.as_chat,
    }
    for name, is_unused in unused.items():
        if is_unused and getattr(options, name):
            unless = " unless --as-chat is given" if name == "system" else ""
            raise ConfigError(f"{_option(name)} has no effect with --{mode}{unless}; leave it out")
    for name in ("capacity", "dense", "policy", "cache"):
        if options.load_cache and getattr(options, name):
            raise ConfigError(
                f"{_option(name)} has no effect with --load-cache, because a saved cache brings its own; leave it out, "
                "or let the cache become larger with --overflow grow"
            )
    for name in SAMPLED:
        if options.greedy and getattr(options, name) is not None:
            raise ConfigError(f"{_option(name)} has no effect with --greedy; leave one of them out")
    if options.dense and options.policy:
        raise ConfigError("--policy has no effect with --dense, which keeps every pair; leave one of them out")
    if options.dense and options.threshold is not None:
        raise ConfigError("--threshold has no effect with --dense, which evicts nothing; leave one of them out")
    if options.output and options.prompts and os.path.realpath(options.output) == os.path.realpath(options.prompts):
        raise ConfigError(f"--output must not be the file of --prompts, got {options.output}; give another file")
    _check_targets(options)


def _check_targets(options: argparse.Namespace) -> None:
    """Refuse to write to a file that exists without --overwrite, to a file of the model, and to no regular file."""
    for name in ("output", "save_cache"):
        path = getattr(options, name)
        if not path:
            continue
        exists = os.path.exists(path)
        if exists and not options.overwrite:
            raise ConfigError(f"{_option(name)} {path} exists; give another file, or --overwrite")
        with naming(_option(name)):
            check_target(path)
        if exists and os.path.dirname(os.path.realpath(path)) == os.path.realpath(options.model):
            raise ConfigError(f"{_option(name)} {path} is a file of the model; give a path outside of its folder")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def one(session: "Session", prompt: "Prompt") -> list[str]:
    """Continue one prompt. Prints the text as it is generated, or one JSON object at the end.

    Returns the place of the prompt if its answer ended at logits that are not finite.
    """
    options, stream = session.options, session.stream()
    ids = session.encode([prompt])[0]
    config = session.config_for([len(ids)], more_to_come=bool(options.save_cache))
    if options.save_cache and options.as_chat:  # the next turn supplies the end of the answer, as its template has it
        config = replace(config, append_stop_id=False)

    def show(rows, last: bool = False) -> None:
        session.write(stream.push(session.without_end(rows[0]), last), end="\n" if last else "")

    result = session.generate([ids], config, session.start_from_loaded(1), show=None if options.json else show)
    session.report.add(len(ids), len(result.tokens[0]), result.cache, 1)
    if options.json:
        costs = session.report.numbers()
        record = {"prompt": prompt.content, **session.record(result, 0, ids), **session.settings(), "costs": costs}
        record |= {name: costs[name] for name in MEMORY_AND_LATENCY}
        print(json.dumps(record, ensure_ascii=False))
    else:
        show(result.tokens, last=True)
    if result.finish_reasons[0] == "non_finite":
        return [prompt.where]  # its cache is of no use, so it is not saved
    session.save(result.cache)
    return []


def many(session: "Session", prompts: "list[Prompt]") -> list[str]:
    """Continue a file of prompts, batch by batch. Each batch is written as soon as it is done.

    Returns the places of the prompts whose answers ended at logits that are not finite.
    """
    from tqdm import tqdm

    from dms_jax.sharding import num_shards

    rows, broken = session.encode(prompts), []
    session.check_lengths(rows, [prompt.where for prompt in prompts])
    config = session.config_for(list(map(len, rows)))  # one capacity for all batches, since each capacity is compiled
    devices = num_shards("batch")  # each gets as many rows
    size = min(session.options.batch, -(-len(prompts) // devices) * devices)
    with (
        _results_file(session.options.output) as file,
        tqdm(total=len(prompts), unit="prompt", disable=not sys.stderr.isatty()) as progress,
    ):
        for start in range(0, len(prompts), size):
            batch = rows[start : start + size]
            # The last batch is filled up with copies of its last prompt, since each number of rows is compiled.
            padded = batch + [batch[-1]] * (size - len(batch))
            result = session.generate(padded, config, session.start_from_loaded(size), first=start)
            for row, ids in enumerate(batch):
                prompt = {"index": start + row, "input": prompts[start + row].record}
                print(json.dumps(prompt | session.record(result, row, ids), ensure_ascii=False), file=file, flush=True)
                if result.finish_reasons[row] == "non_finite":
                    broken.append(prompts[start + row].where)
            new_tokens = sum(map(len, result.tokens[: len(batch)]))
            session.report.add(sum(map(len, batch)), new_tokens, result.cache, len(batch))
            progress.update(len(batch))
    return broken


@contextlib.contextmanager
def _results_file(path: str | None) -> Iterator[TextIO]:
    """Open the file of --output, or give stdout. An error while writing becomes a ConfigError that names it."""
    try:
        if path is None:
            yield sys.stdout
        else:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                yield file
    except BrokenPipeError:
        raise  # the reader has closed the pipe, which is not an error; `run_command` ends quietly
    except OSError as why:
        raise ConfigError(f"cannot write {path or 'stdout'}: {why.strerror or why}") from why
