"""Helpers that all commands share: parsing options, reporting an error in one line, starting the devices.

Importing this module does not load JAX, so that `--help` is instant.
"""

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from dms_jax import __version__
from dms_jax.errors import ConfigError, suggestion

VERSION = f"dms-jax {__version__}"

# Each command, and the module that runs it in a checkout. An installed wheel has `dms-jax NAME` only.
DOORS = {
    "retrofit": "train.retrofit",
    "plan": "train.plan",
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

    An error is printed in one line on stderr. The message about an unknown option suggests the nearest known one.
    """

    def __init__(self, name: str, doc: str | None, **options):
        description = re.sub(r"python -m (?:train|infer)\.(\w+)", lambda found: typed_as(found[1]), doc or "")
        super().__init__(
            prog=typed_as(name),
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        self.add_argument("--version", action="version", version=VERSION, help="show the version of dms_jax and exit")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [
                option for action in self._actions for option in action.option_strings if option.startswith("--")
            ]
            self.error(f"unknown option {unknown[0]}; {suggestion(unknown[0].split('=')[0], options)}")
        return parsed

    def error(self, message: str):
        print(f"{self.prog}: {message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2)


def run_command(name: str, main: Callable[[], int | None]) -> None:
    """Run the `main` of the command `name` and exit with its code.

    A ConfigError becomes one line on stderr and code 2.
    """
    name = typed_as(name).removeprefix("python -m ")
    if sys.stdout is None:  # it was closed when the process started
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    try:
        try:
            code = main() or 0
        except SystemExit as stop:  # argparse, after `--help` or a wrong option
            code = int(stop.code or 0)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, e.g. `| head`, has closed it
        _discard_stdout()
        code = 141  # 128 + SIGPIPE, as a shell reports it
    except OSError as why:
        if why.errno != errno.ENOSPC:
            raise
        _discard_stdout()
        print(f"{name}: cannot write: {why.strerror}; free some space", file=sys.stderr)
        code = 2
    except ConfigError as why:
        print(f"{name}: {one_line(why)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)


def _discard_stdout() -> None:
    """Let what is left in the buffer of stdout go nowhere, so that flushing it when the process ends cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(why: Exception | str, limit: int = 1000) -> str:
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
    except RuntimeError as why:  # e.g. JAX_PLATFORMS names a backend that is not installed
        raise ConfigError(f"JAX found no usable device: {str(why).splitlines()[0]}") from why
    if on_cpu:
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Make glibc reuse large buffers.

    By default glibc maps every large temporary buffer of a step anew. The page faults made attention with small blocks
    up to twice as slow on two cores.
    """
    import ctypes

    M_MMAP_THRESHOLD = -3
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
