"""A conversation in one compact cache: each turn is prefilled after the previous answer.

No token is read twice, unless the chat template changes earlier turns.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from dms_jax.core.cache_base import Cache
from dms_jax.engine.prompts import NOT_ENDED, Prompt, check_text, continuation, next_turn, with_system
from dms_jax.engine.session import Cancelled, Session, non_finite
from dms_jax.errors import ConfigError

COMMANDS = {"/reset": "forget the conversation", "/stats": "speed, compression and memory so far", "/help": "this list"}
FIRST_CAPACITY = 1024  # slots that a conversation starts with; the cache grows by half, and each time it compiles again


class Conversation:
    """A cache, the messages in it, and the ids that it has seen, since the loaded cache if there is one."""

    def __init__(self, session: Session):
        self.session = session
        question = with_system(session.options.system, [{"role": "user", "content": "x"}])
        session.tokenizer.chat_text(question, reply=True)  # fails without a chat template, or if it refuses --system
        first_tokens = min(session.free_context(None), FIRST_CAPACITY)
        # The cache ends before the end of an answer, because a template may put a space or a line break in between.
        self.config = replace(session.config_for([0], first_tokens, more_to_come=True), append_stop_id=False)
        self.turns = 0
        self.warned = False  # that a loaded conversation is not exactly what the template makes of it
        self.reset(session.loaded)

    def reset(self, loaded: Cache | None = None) -> None:
        """Begin a new conversation, after that in a `loaded` cache if there is one."""
        self.cache, self.after_loaded = loaded, loaded is not None
        self.messages: list[dict] = []
        self.seen = np.zeros(0, np.int32)

    def say(self, line: str) -> None:
        """Answer one line on stdout. If this raises ConfigError or Cancelled, the conversation is unchanged."""
        session = self.session
        check_text(Prompt(line, "this line"))
        message = {"role": "user", "content": line}
        ids, cache, seen = self._unread(message)
        session.note_control_tokens([Prompt([message], "this line")])
        free = session.free_context(cache) - len(ids)
        if free < 1:
            raise ConfigError(
                f"a line must fit into this model's context, which has no room for {len(ids)} more tokens; "
                "shorten it, or type /reset to start a new conversation"
            )
        config = replace(self.config, max_new_tokens=min(free, self.config.max_new_tokens))
        stream = session.stream()

        def show(rows: list[np.ndarray], last: bool = False) -> None:
            session.write(stream.push(session.without_end(rows[0]), last), end="\n" if last else "")

        with ctrl_c_asks_to_stop() as stopped:
            result = session.generate([ids], config, cache, first=self.turns, show=show, cancelled=stopped)
        show(result.tokens, last=True)
        if result.finish_reasons[0] == "non_finite":
            raise ConfigError(non_finite(["this answer"]))
        tokens = session.without_end(result.tokens[0])
        self.cache, self.turns, self.seen = result.cache, self.turns + 1, np.concatenate([seen, ids, tokens])
        self.messages += [message, {"role": "assistant", "content": session.text(tokens)}]
        session.report.add(len(ids), len(result.tokens[0]), result.cache, 1, same_cache=True)

    def _unread(self, message: dict) -> tuple[np.ndarray, Cache | None, np.ndarray]:
        """Return the ids to read before the answer to a message, the cache that they continue, and what it has seen.

        The cache then holds what the template makes of the whole conversation. If that does not begin with what the
        cache has seen, as with a template that drops the thoughts of earlier turns, everything is read again.
        """
        options = self.session.options
        encoder = replace(self.session.encoder(), continues=self.after_loaded)
        whole = encoder(Prompt([*self.messages, message], "this line"))
        if (rest := continuation(encoder.tokenizer, self.seen, whole)) is not None:
            return rest, self.cache, self.seen
        if not self.after_loaded:
            print(f"(earlier turns read differently now, so all {len(whole)} tokens are read again)", file=sys.stderr)
            return whole, None, self.seen[:0]
        if not self.warned:
            print("(the template changes earlier turns, but a loaded conversation stays as it is)", file=sys.stderr)
            self.warned = True
        rest = next_turn(
            encoder.tokenizer, options.system, [message], NOT_ENDED, control_tokens=options.allow_control_tokens
        )
        return rest, self.cache, self.seen


def chat(session: Session) -> None:
    """Answer the lines of stdin until it ends."""
    if sys.stdin is None:
        raise ConfigError("--chat reads stdin, which is closed; give --prompt TEXT, or leave stdin open")
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
