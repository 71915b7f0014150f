"""A conversation in one compact cache: each turn is prefilled after the answer before it, nothing is read twice."""

import json
import signal
import sys
from contextlib import contextmanager

import numpy as np

from dms_jax.engine.cache_capacity import round_up
from dms_jax.engine.prompts import Prompt, check_text, next_turn, with_system
from dms_jax.engine.session import Cancelled, Engine
from dms_jax.errors import ConfigError

COMMANDS = {"/reset": "forget the conversation", "/stats": "speed, compression and memory so far", "/help": "this list"}
FIRST_CAPACITY = 1024  # slots a conversation begins with; it grows by half, and each growth compiles anew
NOT_ENDED = -1  # no token id: the last answer was cut off, so its end is still to be given


class Conversation:
    """The cache, and what is needed to go on from it."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.turns = 0
        self.cache = engine.loaded
        self.ended_by: int | None = None
        engine.tokenizer.chat_text(
            [{"role": "user", "content": "x"}], reply=True
        )  # refuses a model without a template at once
        limit = round_up(engine.room(None))
        if engine.config.capacity is None:
            engine.config = _with_capacity(engine.config, min(limit, FIRST_CAPACITY))

    def reset(self) -> None:
        self.cache, self.ended_by = None, None
        self.engine.loaded = None

    def say(self, line: str) -> None:
        """Answer one line on stdout. Raises ConfigError and Cancelled, and has then not changed."""
        engine = self.engine
        check_text(Prompt(line, "this line"))
        message = [{"role": "user", "content": line}]
        if self.cache is None:
            ids = engine.tokenizer.encode_chat(with_system(engine.options.system, message), reply=True)
        else:
            ids = next_turn(engine.tokenizer, engine.options.system, message, self.ended_by)
        room = engine.room(self.cache) - len(ids)
        if room < 1:
            raise ConfigError(
                f"the conversation has no room for {len(ids)} tokens more within this model's context; /reset starts anew"
            )
        stream = engine.stream()

        def show(rows: list[np.ndarray]) -> None:
            print(stream.push(engine.shown(rows[0])), end="", flush=True)

        with stopping() as stop:
            result = engine.generate([ids], self.cache, self.turns, show, stop, min(room, engine.config.max_new_tokens))
        tokens = result.tokens[0]
        print(stream.push(engine.shown(tokens), last=True), flush=True)
        self.cache, self.turns = result.cache, self.turns + 1
        self.ended_by = int(tokens[-1]) if result.finish_reasons[0] == "stop_id" else NOT_ENDED
        engine.report.add(len(ids), len(tokens), result.cache, 1, goes_on=True)


def chat(engine: Engine) -> None:
    """Read lines until the end of stdin, answer each."""
    talk, terminal = Conversation(engine), sys.stdin.isatty()
    if terminal:
        print(
            "Ctrl-C stops an answer, Ctrl-D ends; " + ", ".join(f"{name}: {what}" for name, what in COMMANDS.items()),
            file=sys.stderr,
        )
        import readline  # noqa: F401  (gives input() its history and editing)
    while True:
        try:
            line = (input("> ") if terminal else _next_line()).strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n(Ctrl-D ends)", file=sys.stderr)
            continue
        if line.startswith("/"):
            _command(talk, line)
        elif line:
            try:
                talk.say(line)
            except Cancelled:
                print("(stopped)", file=sys.stderr)
            except ConfigError as why:
                print(f"{' '.join(str(why).split())}", file=sys.stderr)
    if terminal:
        print(file=sys.stderr)
    engine.save(talk.cache)


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _command(talk: Conversation, line: str) -> None:
    if line == "/reset":
        talk.reset()
    elif line == "/stats":
        report = talk.engine.report
        print(json.dumps(report.numbers()) if talk.engine.options.json else report.table(), file=sys.stderr)
    else:
        if line != "/help":
            print(f"unknown command {line.split()[0]}; there are:", file=sys.stderr)
        print("\n".join(f"{name}  {what}" for name, what in COMMANDS.items()), file=sys.stderr)


@contextmanager
def stopping():
    """While this is open, Ctrl-C makes the yielded function say True, instead of tearing the step under way."""
    pressed = []

    def remember(*_):
        if pressed:  # the second time: the user means the program
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _with_capacity(config, capacity: int):
    from dataclasses import replace

    return replace(config, capacity=capacity, overflow=config.overflow or "grow")
