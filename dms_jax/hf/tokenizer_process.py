"""A process of its own for tokenizers and chat templates, with a deadline for every call and a limit on memory.

Files from the internet decide what they compute: a template may loop for ever or write gigabytes, a pattern may
backtrack for years, and the Rust code that runs it can neither be interrupted nor be caught when it aborts. A process
can be killed. One serves all tokenizers of this program; it is started by the first call, and again after it was
killed. A call costs about a tenth of a millisecond.

Frames are a length of 8 bytes and the content: the request is JSON; the reply is one letter and the result.
"""

import array
import atexit
import collections
import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

LOAD_SECONDS = 120.0  # importing transformers and reading a large vocabulary on a busy machine
CALL_SECONDS = 20.0  # for a short text
SECONDS_PER_MEGABYTE = 10.0  # of text, in addition; an ordinary tokenizer needs less than one
MEMORY_GIB = 4  # address space of the process
MEMORY_PER_BYTE = 256  # bytes of address space in addition, for each byte of the request
OUTPUT_MIB = 64  # largest reply: a rendered chat, or four bytes for each id
OUTPUT_PER_BYTE = 16  # bytes of the reply in addition, for each byte of the request
LENGTH_BYTES = 8


class ProcessError(Exception):
    """A call failed; the message is one line."""


class TokenizerProcess:
    """The process, and the calls to it. Methods may be called from several threads."""

    def __init__(self):
        self._lock, self._loaded = threading.Lock(), set[int]()
        self._numbers, self._unused = itertools.count(), collections.deque[int]()
        self._process: subprocess.Popen[bytes] | None = None

    def new_number(self) -> int:
        """Return the number of a new tokenizer. Two of the same folder differ, because its files may have changed."""
        return next(self._numbers)

    def call(self, number: int, folder: str, method: str, **arguments) -> Any:
        """Call a method of the `TokenizerRules` of a tokenizer. Raises ProcessError."""
        with self._lock:
            if not self._runs():
                self._start()
            while self._unused:
                if (unused := self._unused.popleft()) in self._loaded:
                    self._loaded.discard(unused)
                    self._exchange({"number": unused, "method": "forget"}, CALL_SECONDS)
            if number not in self._loaded:
                self._exchange({"number": number, "method": "load", "arguments": {"folder": folder}}, LOAD_SECONDS)
                self._loaded.add(number)
            return self._exchange({"number": number, "method": method, "arguments": arguments}, CALL_SECONDS)

    def forget(self, number: int) -> None:
        """Free the memory of a tokenizer with the next call. It takes no lock, because the garbage collector calls it
        in the middle of anything."""
        self._unused.append(number)

    def _runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process, self._loaded = None, set()

    def _start(self) -> None:
        self.stop()
        package = str(Path(__file__).parents[2])
        inherited = os.environ.get("PYTHONPATH")
        environment = os.environ | {
            "PYTHONPATH": package if not inherited else package + os.pathsep + inherited,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # no advice about torch not being installed
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
            "OPENBLAS_NUM_THREADS": "1",  # each thread would reserve address space
            "PYTHONIOENCODING": "utf-8",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from dms_jax.hf.tokenizer_process import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this program, which then stops the process itself
        )

    def _exchange(self, request: dict, seconds: float) -> Any:
        process: Any = self._process
        data = json.dumps(request).encode()
        deadline = time.monotonic() + seconds + SECONDS_PER_MEGABYTE * len(data) / 2**20
        try:
            _write(process.stdin, data)
            size = int.from_bytes(_read(process.stdout, LENGTH_BYTES, deadline), "little")
            if size > output_limit(len(data)) + 2**16:
                raise TimeoutError  # `serve` sends no such reply
            reply = _read(process.stdout, size, deadline)
        except TimeoutError:  # which is an OSError
            self.stop()
            raise ProcessError(f"it took more than {seconds:.0f} seconds") from None
        except (OSError, EOFError):
            self.stop()
            raise ProcessError(
                f"it ended with status {process.returncode}; it may use at most {MEMORY_GIB} GiB of memory"
            ) from None
        except BaseException:  # Ctrl-C: the rest of the reply would be taken for the next one
            self.stop()
            raise
        kind, body = reply[:1], reply[1:]
        if kind == b"e":
            raise ProcessError(body.decode("utf-8", "replace"))
        return array.array("i", body) if kind == b"i" else json.loads(body)


def _read(file: BinaryIO, count: int, deadline: float) -> bytes:
    found = bytearray()
    while len(found) < count:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([file], [], [], left)[0]:
            raise TimeoutError
        part = os.read(file.fileno(), count - len(found))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


PROCESS = TokenizerProcess()
atexit.register(PROCESS.stop)


def serve() -> None:
    """Answer calls until stdin ends. This is the main function of the process."""
    # transformers would load these if they are installed. Tokenizers do not need them, and their libraries take more
    # address space than the limit.
    for library in ("torch", "torchvision", "tensorflow", "jax"):
        sys.modules[library] = None  # pyrefly: ignore[unsupported-operation]  # then importing it raises ImportError
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not become part of a reply
    tokenizers: dict[int, Any] = {}
    while head := requests.read(LENGTH_BYTES):
        size = int.from_bytes(head, "little")
        request = json.loads(requests.read(size))
        try:
            _limit_memory(size)
            reply = _answer(tokenizers, output_limit(size), **request)
        except KeyboardInterrupt:
            return
        except BaseException as why:  # the panics of Rust code are no Exceptions
            reply = b"e" + (str(why) or type(why).__name__).encode("utf-8", "replace")[: 2**16]
        _write(replies, reply)


def output_limit(request: int) -> int:
    """Return how many bytes the reply to a request of that many bytes may have."""
    return (OUTPUT_MIB << 20) + OUTPUT_PER_BYTE * request


def _limit_memory(request: int) -> None:
    """Limit the address space for a request of that many bytes. Code in a template cannot raise the limit."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows, or with a lower limit set already
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, ((MEMORY_GIB << 30) + MEMORY_PER_BYTE * request, hard))


def _answer(tokenizers: dict[int, Any], limit: int, number: int, method: str, arguments: dict | None = None) -> bytes:
    if method == "load":
        from dms_jax.hf.tokenizer_rules import TokenizerRules

        tokenizers[number] = TokenizerRules(**arguments or {})
        return b"jnull"
    if method == "forget":
        tokenizers.pop(number, None)
        return b"jnull"
    result = getattr(tokenizers[number], method)(**arguments or {})
    is_ids = isinstance(result, list)
    size = 4 * len(result) if is_ids else len(result)
    if size > limit:
        raise ValueError(f"its output is larger than {limit >> 20} MiB")
    if is_ids:
        return b"i" + array.array("i", result).tobytes()
    if isinstance(result, str):
        result.encode()  # half of a surrogate pair is no text
    return b"j" + json.dumps(result).encode()


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
    file.flush()
