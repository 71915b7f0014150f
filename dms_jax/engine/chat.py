"""A conversation in one compact cache: each turn is prefilled after the previous answer, so no token is read twice."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from dms_jax.engine.prompts import Prompt, check_text, next_turn, with_system
from dms_jax.engine.session import Cancelled, Session
from dms_jax.errors import ConfigError

COMMANDS = {"/reset": "forget the conversation", "/stats": "speed, compression and memory so far", "/help": "this list"}
FIRST_CAPACITY = 1024  # slots that a conversation starts with; the cache grows by half, and each time it compiles again
NOT_ENDED = -1  # not a token id: the last answer was cut off, so the next turn must supply its end


class Conversation:
    """A cache, its settings, and the id that ended the last answer in it."""

    def __init__(self, session: Session):
        self.session = session
        session.tokenizer.chat_text([{"role": "user", "content": "x"}], reply=True)  # fails without a chat template
        first_tokens = min(session.free_context(None), FIRST_CAPACITY)
        self.config = session.config_for([0], first_tokens, more_to_come=True)
        self.cache = session.loaded
        self.turns = 0
        self.ended_by: int | None = None

    def reset(self) -> None:
        self.cache, self.ended_by = None, None

    def say(self, line: str) -> None:
        """Answer one line on stdout. If this raises ConfigError or Cancelled, the conversation is unchanged."""
        session = self.session
        check_text(Prompt(line, "this line"))
        message = [{"role": "user", "content": line}]
        if self.cache is None:
            ids = session.tokenizer.encode_chat(with_system(session.options.system, message), reply=True)
        else:
            ids = next_turn(session.tokenizer, session.options.system, message, self.ended_by)
        free = session.free_context(self.cache) - len(ids)
        if free < 1:
            raise ConfigError(
                f"a line must fit into this model's context, which has no room for {len(ids)} more tokens; "
                "shorten it, or type /reset to start a new conversation"
            )
        config = replace(self.config, max_new_tokens=min(free, self.config.max_new_tokens))
        stream = session.stream()

        def show(rows: list[np.ndarray], last: bool = False) -> None:
            print(stream.push(session.without_end(rows[0]), last), end="\n" if last else "", flush=True)

        with ctrl_c_asks_to_stop() as stopped:
            result = session.generate([ids], config, self.cache, first=self.turns, show=show, cancelled=stopped)
        show(result.tokens, last=True)
        tokens = result.tokens[0]
        self.cache, self.turns = result.cache, self.turns + 1
        self.ended_by = int(tokens[-1]) if result.finish_reasons[0] == "stop_id" else NOT_ENDED
        session.report.add(len(ids), len(tokens), result.cache, 1, same_cache=True)


def chat(session: Session) -> None:
    """Answer the lines of stdin until it ends."""
    conversation, terminal = Conversation(session), sys.stdin.isatty()
    if terminal:
        commands = ", ".join(f"{name}: {what}" for name, what in COMMANDS.items())
        print(f"Ctrl-C stops an answer, Ctrl-D ends; {commands}", file=sys.stderr)
        import readline  # noqa: F401  # gives input() its history and editing
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
            _run_command(conversation, line)
        elif line:
            try:
                conversation.say(line)
            except Cancelled:
                print("(stopped)", file=sys.stderr)
            except ConfigError as why:
                print(" ".join(str(why).split()), file=sys.stderr)
    if terminal:
        print(file=sys.stderr)
    session.save(conversation.cache)


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _run_command(conversation: Conversation, line: str) -> None:
    session = conversation.session
    if line == "/reset":
        conversation.reset()
    elif line == "/stats":
        report = session.report
        print(json.dumps(report.numbers()) if session.options.json else report.table(), file=sys.stderr)
    else:
        if line != "/help":
            print(f"unknown command {line.split()[0]}; the commands are:", file=sys.stderr)
        print("\n".join(f"{name}  {what}" for name, what in COMMANDS.items()), file=sys.stderr)


@contextmanager
def ctrl_c_asks_to_stop() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C set a flag, which the yielded function returns; the second one interrupts the program."""
    pressed = []

    def remember(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
