"""Helpers that all commands share: parsing options, reporting an error in one line, starting the devices.

Importing this module does not load JAX, so that `--help` is instant.
"""

import argparse
import contextlib
import errno
import io
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from dms_jax import __version__
from dms_jax.errors import ConfigError, suggestion
from dms_jax.files import user_cache

VERSION = f"dms-jax {__version__}"
CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX's own; "" stands for no cache
CACHE_BYTES = 1 << 30  # of compiled programs; those that were used least recently are deleted

# Each command, and the module that runs it in a checkout. An installed wheel has `dms-jax NAME` only.
DOORS = {
    "retrofit": "train.retrofit",
    "plan": "train.plan",
    "inspect": "train.inspect",
    "generate": "infer.generate",
    "evaluate": "infer.evaluate",
    "hyperscale": "infer.hyperscale",
    "report": "infer.report",
}


def typed_as(name: str) -> str:
    """Return the command `name` as the user types it.

    That is `dms-jax NAME` if this process was started that way, else `python -m DOOR`.
    """
    started = Path(sys.argv[0])
    if started.name == "dms-jax" or started.parts[-2:] == ("dms_jax", "__main__.py"):
        return f"dms-jax {name}"
    return f"python -m {DOORS.get(name, name)}"  # the name of a benchmark is its module


class Parser(argparse.ArgumentParser):
    """The argument parser of the command `name`; `doc`, its module's docstring, is the description in `--help`.

    An error is printed in one line on stderr. The message about an unknown option suggests the nearest known one. A
    command that `compiles` programs has the option --no-compile-cache.
    """

    def __init__(self, name: str, doc: str | None, compiles: bool = False, **options):
        description = re.sub(r"python -m (?:train|infer)\.(\w+)", lambda found: typed_as(found[1]), doc or "")
        if typed_as(name).startswith("dms-jax"):  # a wheel has no configs/
            description = re.sub(r"configs/\S+(\.\w+)", r"FILE\1", description)
        super().__init__(
            prog=typed_as(name),
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        self.add_argument("--version", action="version", version=VERSION, help="show the version of dms_jax and exit")
        if compiles:
            self.add_argument(
                "--no-compile-cache",
                action="store_true",
                help="do not keep compiled programs in the user's cache folder for the next start; the variable "
                f"{CACHE_VARIABLE} chooses another folder",
            )

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [
                option for action in self._actions for option in action.option_strings if option.startswith("--")
            ]
            self.error(f"unknown option {unknown[0]}; {suggestion(unknown[0].split('=')[0], options)}")
        if getattr(parsed, "no_compile_cache", False):
            os.environ[CACHE_VARIABLE] = ""  # read by JAX when it is imported, and by `start_devices`
        return parsed

    def error(self, message: str):
        print(f"{self.prog}: {message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2)


def run_command(name: str, main: Callable[[], int | None]) -> None:
    """Run the `main` of the command `name` and exit with its code.

    What the user can change becomes one line on stderr and code 2: a ConfigError, a full disk, too little memory, a
    closed stdout. An exception that nobody expected is a defect of ours: its traceback goes to a file that the line
    names, so that it can be reported, and the code is 1. SIGTERM and SIGHUP unwind the command like Ctrl-C, so that
    what it holds is released; a SIGHUP that `nohup` ignores stays ignored.
    """
    name = typed_as(name).removeprefix("python -m ").strip() or "dms-jax"
    warnings.formatwarning = lambda message, *_, **__: f"{name}: warning: {one_line(message)}\n"  # no line of code
    code: int = 2
    if _replace_closed_streams():
        try:
            try:
                with _signals_unwind():
                    code = main() or 0
            except SystemExit as stop:  # argparse, after `--help` or a wrong option
                code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of a pipe, e.g. `| head`, has closed it
            code = 141  # 128 + SIGPIPE, as a shell reports it
        except KeyboardInterrupt:
            _complain(f"{name}: interrupted")
            code = 128 + signal.SIGINT
        except _Ended as why:
            _complain(f"{name}: ended by {signal.Signals(why.number).name}")
            code = 128 + why.number
        except BaseException as why:
            if (line := explained(why)) is None:
                line, code = f"unexpected {type(why).__name__}: {one_line(why, 300)}; please report this defect", 1
            if code == 1 or isinstance(why, RecursionError) or not isinstance(why, Exception):
                line += _kept_traceback(why)
            _complain(f"{name}: {one_line(line)}")
    else:
        _complain(f"{name}: stdout is closed; redirect it to a file or to {os.devnull}")
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as why:  # what is left in its buffer cannot be written, not even when Python ends
            _discard(stream)
            if code == 0:
                _complain(f"{name}: {one_line(explained(why) or why)}")
                code = 2
    raise SystemExit(code)


def explained(why: BaseException) -> str | None:
    """Return the line about an error that the user or the machine can change; None for a defect of this program."""
    text = str(why)
    if isinstance(why, ConfigError):
        return text
    if isinstance(why, OSError):
        place = "".join(f" {name}" for name in (why.filename, why.filename2) if name is not None)
        advice = {errno.ENOSPC: "; free some space", errno.EDQUOT: "; free some space"}.get(why.errno or 0, "")
        return f"cannot read or write{place or ' a file or stream'}: {why.strerror or why}{advice}"
    if isinstance(why, MemoryError):
        return "out of memory; use smaller sizes or batches, or a machine with more memory"
    if isinstance(why, RecursionError):
        return "the input is nested too deeply, or refers to itself; make it flatter"
    if isinstance(why, RuntimeError) and re.search("RESOURCE_EXHAUSTED|CUDA_ERROR_OUT_OF_MEMORY", text):
        return f"out of device memory; use smaller sizes or batches, or more devices ({text.splitlines()[0][:200]})"
    if _is_without_device(why):
        return _without_device(why)
    if type(why).__name__ == "PanicException":  # Rust's, of tokenizers, safetensors and others; not an Exception
        return f"a library failed on this input: {text or 'it gave no reason'}; check the files of the model and data"
    return None


def _is_without_device(why: BaseException) -> bool:
    """Whether JAX found no backend; for a plugin without a device it fails in an assertion of its own."""
    frames = traceback.extract_tb(why.__traceback__)
    in_jax = bool(frames) and Path(frames[-1].filename).name == "xla_bridge.py"
    return in_jax and isinstance(why, RuntimeError | AssertionError)


def _without_device(why: BaseException) -> str:
    reason = (str(why) or "none of the kind asked for").splitlines()[0]
    asked = os.environ.get("JAX_PLATFORMS", "")
    advice = f"; JAX_PLATFORMS is {asked!r}: unset it, or use JAX_PLATFORMS=cpu" if asked else ""
    return f"JAX found no usable device: {reason}{advice}"


def _kept_traceback(why: BaseException) -> str:
    """Write the traceback to a file, and return the end of a line that names it. Without a file it goes to stderr."""
    text = "".join(traceback.format_exception(why))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="dms-jax-", suffix=".txt", delete=False, errors="replace") as file:
            file.write(text)
    except (OSError, ValueError):
        _complain(text)
        return ""
    return f" (details are in {file.name})"


class _Ended(BaseException):
    """SIGTERM or SIGHUP, as an exception that unwinds the command. It is no Exception, so that no library eats it."""

    def __init__(self, number: int):
        self.number = number


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """Raise _Ended at SIGTERM and SIGHUP where they would end the process at once, and restore that at the end."""

    def unwind(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        raise _Ended(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        taken = []
    for number in taken:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


class _ClosedInput(io.TextIOBase):
    """Stands for a stdin that was closed before the process started."""

    def readline(self, size: int | None = -1) -> str:
        raise ConfigError("stdin is closed, and there is nothing to read; redirect it from a file or a terminal")

    def read(self, size: int | None = -1) -> str:
        return self.readline()


def _replace_closed_streams() -> bool:
    """Put something in the place of standard streams that were closed when the process started.

    Their file descriptors are taken, so that no file that the command opens gets them and is mistaken for them. Returns
    False if stdout was closed, because then the results of the command would be lost.
    """
    streams = sys.stdin, sys.stdout, sys.stderr
    for number, stream in enumerate(streams):
        if stream is None:
            try:
                os.fstat(number)
            except OSError:
                other = os.open(os.devnull, os.O_RDWR)
                if other != number:
                    os.dup2(other, number)
                    os.close(other)
    sys.stdin = sys.stdin or _ClosedInput()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    return streams[1] is not None


def _complain(line: str) -> None:
    """Print a line on stderr, if it can be written to."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _discard(stream: TextIO) -> None:
    """Let what is left in a buffer go nowhere, so that flushing it when the process ends cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(why: BaseException | str, limit: int = 1000) -> str:
    """Return a message as one printable line of at most about `limit` characters.

    Unprintable characters are replaced, and the middle of a long message is cut out.
    """
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(why).split()))
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]} ... {text[-limit // 3 :]}"


def start_devices(num_devices: int, distributed: str = "") -> None:
    """Start JAX with `num_devices` devices; a CPU simulates them. Call this before anything else uses JAX.

    `distributed`: "" for one process; "auto" lets JAX detect Slurm, Open MPI, Kubernetes or a TPU pod;
    "HOST:PORT,COUNT,INDEX" gives the address of the coordinator, the number of processes and the index of this process.
    """
    import jax

    if CACHE_VARIABLE not in os.environ:
        _keep_programs(jax.config)
    address, processes, process = None, 1, None
    if distributed and distributed != "auto":
        try:
            address, count, index = distributed.split(",")
            processes, process = int(count), int(index)
        except ValueError:
            raise ConfigError(f'--distributed must be "auto" or HOST:PORT,COUNT,INDEX, got {distributed!r}') from None
        if num_devices % processes:
            raise ConfigError(f"--mesh: {num_devices} devices cannot be divided evenly among {processes} processes")
    if distributed != "auto":  # with "auto", the number of processes is not known yet, so each gets one CPU device
        with contextlib.suppress(RuntimeError):  # JAX is already running, in a notebook or a test
            jax.config.update("jax_num_cpu_devices", num_devices // processes)
    if distributed:
        try:
            if distributed == "auto":
                jax.distributed.initialize()
            else:
                jax.distributed.initialize(address, processes, process)
        except (RuntimeError, ValueError) as why:
            reason = str(why).splitlines()[0]
            if "should be defined" in reason:  # JAX's advice is about its Python API
                reason = "JAX did not detect Slurm, Open MPI, Kubernetes or a TPU pod; use HOST:PORT,COUNT,INDEX"
            raise ConfigError(f"--distributed {distributed}: {reason}") from why
    try:
        on_cpu = jax.default_backend() == "cpu"
    except (RuntimeError, AssertionError) as why:  # JAX_PLATFORMS names a backend without a plugin or a device
        raise ConfigError(_without_device(why)) from why
    if on_cpu:
        _keep_freed_memory()


def _keep_programs(config: Any) -> None:
    """Let JAX keep compiled programs in the user's cache folder, so that the next start does not compile them again."""
    try:
        folder = user_cache("compiled")
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as why:  # RuntimeError: the user has no home folder
        warnings.warn(
            f"compiled programs are not kept for the next start, because their folder cannot be written: {why}; set "
            f"{CACHE_VARIABLE} or XDG_CACHE_HOME to a writable folder, or give --no-compile-cache",
            stacklevel=3,
        )
        return
    config.update("jax_compilation_cache_dir", str(folder))
    config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _keep_freed_memory() -> None:
    """Make glibc keep and reuse the memory of large buffers.

    By default glibc maps every large temporary buffer of a step anew, and returns free memory at the end of the heap.
    On two cores, the page faults made attention with small blocks up to twice as slow, and a label row take 11.4 s
    instead of 8.8 s.
    """
    import ctypes

    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST = -1, -3, 2**31 - 1
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST)
