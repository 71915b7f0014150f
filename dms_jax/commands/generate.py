"""Continue text with a model over a compact cache: one prompt, a file of prompts, or a chat.

    python -m infer.generate --model runs/retrofit/export --prompt "The capital of France is"
    python -m infer.generate --model runs/retrofit/export --prompts questions.jsonl --as-chat --batch 4 --output answers.jsonl
    python -m infer.generate --model runs/retrofit/export --chat --temperature 0.7 --top-p 0.9

--prompts: a .txt file has one prompt on each line, a .jsonl file one object with "prompt" (text) or "messages" (a chat).
--chat: Ctrl-C stops an answer, /reset starts anew, /stats shows the costs so far, Ctrl-D ends.
Text goes to stdout; a table of speed, compression and memory ends on stderr.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import get_args

from dms_jax.command import Parser, start_devices
from dms_jax.config import ImplementationName
from dms_jax.errors import ConfigError

NAME = "generate"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    parser.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder, hub id or .gguf file")
    parser.add_argument("--adapter", metavar="FILE", help="an adapter of this base model")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of weights and cache; float32 on a CPU, else bfloat16"
    )
    parser.add_argument(
        "--implementation",
        choices=get_args(ImplementationName),
        default="auto",
        help="of attention; auto: the fastest one measured on the device",
    )
    what = parser.add_argument_group("what to continue (one of the first three)")
    what.add_argument("--prompt", metavar="TEXT", help="one prompt; its continuation is printed as it comes")
    what.add_argument("--prompts", metavar="FILE", help="many, .txt or .jsonl; the results are JSON lines")
    what.add_argument("--chat", action="store_true", help="a conversation with the lines of stdin, all in one cache")
    what.add_argument(
        "--as-chat", action="store_true", help="put each plain prompt into the chat template, as what a user says"
    )
    what.add_argument("--system", metavar="TEXT", help="the system message of a chat")
    what.add_argument("--batch", type=int, default=1, metavar="N", help="prompts of a file at a time (default 1)")
    what.add_argument("--output", metavar="FILE", help="where the results of --prompts go, instead of stdout")
    what.add_argument("--overwrite", action="store_true", help="replace the files of --output and --save-cache")
    how = parser.add_argument_group("sampling")
    how.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of each answer (default 128)")
    how.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    how.add_argument("--top-k", type=int, default=0, metavar="N", help="0: off")
    how.add_argument("--top-p", type=float, default=1.0, help="1: off")
    how.add_argument("--min-p", type=float, default=0.0, help="0: off")
    how.add_argument("--repetition-penalty", type=float, default=1.0, help="1: off")
    how.add_argument("--seed", type=int, default=0, help="prompt i of a file draws with seed + i, turn i of a chat too")
    how.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be given several times"
    )
    how.add_argument("--ignore-eos", action="store_true", help="go on after the model's end-of-text")
    cache = parser.add_argument_group("cache")
    cache.add_argument(
        "--capacity",
        metavar="N[,N...]",
        help="slots per row and KV head, one number or one per layer; default: enough for all tokens",
    )
    cache.add_argument(
        "--overflow",
        choices=["evict", "raise", "grow"],
        help="when a head wants more; default evict, dense raise; "
        "grow in a chat and with --save-cache, unless there is a --capacity",
    )
    cache.add_argument("--dense", action="store_true", help="ignore the policy, keep everything")
    cache.add_argument(
        "--threshold", type=float, help="a token evicts iff its logit exceeds it (default 0); lower forgets more"
    )
    cache.add_argument("--chunk-size", type=int, metavar="N", help="tokens of the prefill at a time")
    cache.add_argument("--save-cache", metavar="FILE", help="write the cache at the end (--prompt and --chat)")
    cache.add_argument(
        "--load-cache", metavar="FILE", help="go on from a saved cache; each prompt of a file gets a copy"
    )
    parser.add_argument(
        "--json", action="store_true", help="--prompt: print one JSON object; else: the closing table as JSON"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    check(options)
    from dms_jax.engine.prompts import Prompt, check_text, read_prompts

    prompts = (
        read_prompts(options.prompts)
        if options.prompts
        else [Prompt(options.prompt, "--prompt")]
        if options.prompt is not None
        else []
    )
    for name in ("prompt", "system", "stop"):
        given = getattr(options, name) or []
        for text in [given] if isinstance(given, str) else given:
            check_text(Prompt(text, f"--{name}"))
    for stream, errors in (
        (sys.stdin, "replace"),
        (sys.stdout, "replace"),
    ):  # a terminal that cannot show a character shows ?
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    start_devices(1)
    import jax

    from dms_jax.engine.session import Engine

    try:
        engine = Engine(options)
        if options.chat:
            from dms_jax.engine.chat import chat

            chat(engine)
        elif options.prompts:
            many(engine, prompts)
        else:
            one(engine, prompts[0])
            if options.json:
                return 0
        print(json.dumps(engine.report.numbers()) if options.json else engine.report.table(), file=sys.stderr)
    except (MemoryError, jax.errors.JaxRuntimeError) as why:
        if isinstance(why, MemoryError) or "RESOURCE_EXHAUSTED" in str(why):
            raise ConfigError(
                "out of memory; give a smaller --capacity, --batch or --chunk-size, or --dtype bfloat16"
            ) from why
        raise
    except BrokenPipeError:  # the reader of stdout has what it wanted, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def check(options: argparse.Namespace) -> None:
    """What can be refused before anything is read or imported."""
    if not options.model:
        raise ConfigError(
            "--model is missing; give a Hugging Face folder, a hub id or a .gguf file, e.g. --model runs/retrofit/export"
        )
    if (options.prompt is not None) + (options.prompts is not None) + options.chat != 1:
        raise ConfigError("say what to continue with one of --prompt TEXT, --prompts FILE and --chat")
    if options.prompt == "":
        raise ConfigError("--prompt is empty; give at least one token")
    if options.batch < 1:
        raise ConfigError(f"--batch must be a whole number >= 1, got {options.batch}")
    mode = "prompt" if options.prompt is not None else "prompts" if options.prompts else "chat"
    unused = {
        "output": mode != "prompts",
        "batch": mode != "prompts" and options.batch != 1,
        "as_chat": mode == "chat",
        "save_cache": mode == "prompts",
        "system": mode == "prompt" and not options.as_chat,
    }
    for name, wrong in unused.items():
        if wrong and getattr(options, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} has no use with --{mode}"
                + (" unless --as-chat is given" if name == "system" else "")
            )
    for name in ("capacity", "dense"):
        if options.load_cache and getattr(options, name):
            raise ConfigError(
                f"--{name} has no use with --load-cache: a saved cache brings its own; --overflow grow lets it become larger"
            )
    if options.dense and options.threshold is not None:
        raise ConfigError("--threshold has no use with --dense: nothing is evicted")
    for name in ("output", "save_cache"):
        path = getattr(options, name)
        if path and os.path.exists(path) and not options.overwrite:
            raise ConfigError(f"{path} exists; give another file, or --overwrite")
        if path and os.path.isdir(path):
            raise ConfigError(f"--{name.replace('_', '-')} {path} is a folder; give a file")


def one(engine, prompt) -> None:
    """One prompt, printed as it is continued, or as one JSON object."""
    options = engine.options
    ids = engine.encoder()(prompt)
    stream = engine.stream()

    def show(rows):
        print(stream.push(engine.shown(rows[0])), end="", flush=True)

    result = engine.generate([ids], show=None if options.json else show)
    engine.report.add(len(ids), len(result.tokens[0]), result.cache, 1)
    if options.json:
        print(
            json.dumps(
                {"prompt": prompt.content} | engine.row(result, 0, ids) | {"costs": engine.report.numbers()},
                ensure_ascii=False,
            )
        )
    else:
        print(stream.push(engine.shown(result.tokens[0]), last=True), flush=True)
    engine.save(result.cache)


def many(engine, prompts) -> None:
    """A file of prompts, batch by batch; each batch is written when it is done."""
    from tqdm import tqdm

    options, encode = engine.options, engine.encoder()
    ids = [encode(prompt) for prompt in prompts]
    engine.refuse_too_long(ids, [prompt.where for prompt in prompts])
    try:
        if options.output:
            Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        file = open(options.output, "w", encoding="utf-8") if options.output else sys.stdout  # noqa: SIM115
    except OSError as why:
        raise ConfigError(f"cannot write {options.output}: {why.strerror or why}") from why
    size = min(options.batch, len(prompts))
    try:
        with tqdm(total=len(prompts), unit="prompt", disable=not sys.stderr.isatty()) as progress:
            for start in range(0, len(prompts), size):
                rows = ids[start : start + size]
                # The last batch is filled up with its last prompt: another number of rows would be compiled anew.
                result = engine.generate(rows + [rows[-1]] * (size - len(rows)), first=start)
                for row in range(len(rows)):
                    line = {"index": start + row, "input": prompts[start + row].record} | engine.row(
                        result, row, rows[row]
                    )
                    print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
                new = sum(len(tokens) for tokens in result.tokens[: len(rows)])
                engine.report.add(sum(map(len, rows)), new, result.cache, len(rows))
                progress.update(len(rows))
    except OSError as why:
        if isinstance(why, BrokenPipeError):
            raise
        raise ConfigError(f"cannot write {options.output or 'stdout'}: {why.strerror or why}") from why
    finally:
        if options.output:
            file.close()
