"""What every command shares: options, one-line errors, simulated devices. Imports no accelerator library by itself."""

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from dms_jax.errors import ConfigError, suggestion

DOORS = {  # each command and its door in a checkout; an installed wheel has `dms-jax NAME` only
    "retrofit": "train.retrofit",
    "plan": "train.plan",
    "generate": "infer.generate",
    "evaluate": "infer.evaluate",
    "hyperscale": "infer.hyperscale",
    "report": "infer.report",
}


def typed_as(name: str) -> str:
    """How the command `name` is typed where this process was started: `dms-jax NAME`, or `python -m DOOR` in a checkout."""
    started = Path(sys.argv[0])
    if started.name == "dms-jax" or started.parts[-2:] == ("dms_jax", "__main__.py"):
        return f"dms-jax {name}"
    return f"python -m {DOORS.get(name, name)}"  # a benchmark is its own door


class Parser(argparse.ArgumentParser):
    """argparse for the command `name`: its description is the module's docstring, and an unknown option is answered on one line with
    the nearest known one."""

    def __init__(self, name: str, doc: str | None, **options):
        description = re.sub(r"python -m (?:train|infer)\.(\w+)", lambda found: typed_as(found[1]), doc or "")
        super().__init__(
            prog=typed_as(name),
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

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
    """Run the `main` of the command `name` and exit: 2 with one line on stderr for whatever the user can mend, else main's own code."""
    name = typed_as(name).removeprefix("python -m ")
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # what a shell says of SIGPIPE
    except ConfigError as why:
        print(f"{name}: {one_line(why)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)


def one_line(why: Exception | str, most: int = 1000) -> str:
    """A message as a line to read, whatever it quotes: the middle of a very long one and unprintable characters are left out."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(why).split()))
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"


def start_devices(num_devices: int, distributed: str = "") -> None:
    """Prepare JAX for `num_devices`, before anything touches it: a CPU simulates as many as are asked for.

    `distributed`: "" for one process; "auto" lets JAX detect Slurm, Open MPI, Kubernetes or a TPU pod; "HOST:PORT,COUNT,INDEX" says it.
    """
    import jax

    address, processes, process = None, 1, None
    if distributed and distributed != "auto":
        try:
            address, count, index = distributed.split(",")
            processes, process = int(count), int(index)
        except ValueError:
            raise ConfigError(f'--distributed wants "auto" or HOST:PORT,COUNT,INDEX; got {distributed!r}') from None
        if num_devices % processes:
            raise ConfigError(f"{num_devices} devices cannot be shared evenly by {processes} processes")
    if distributed != "auto":  # of which JAX knows the number of processes too late: there each has one CPU
        with contextlib.suppress(RuntimeError):  # JAX already runs (a notebook, a test): the mesh checks what there is
            jax.config.update("jax_num_cpu_devices", num_devices // processes)
    if distributed:
        try:
            if distributed == "auto":
                jax.distributed.initialize()
            else:
                jax.distributed.initialize(address, processes, process)
        except (RuntimeError, ValueError) as why:
            reason = str(why).splitlines()[0]
            if "should be defined" in reason:  # JAX asks for what it did not detect
                reason = "JAX detects no Slurm, Open MPI, Kubernetes or TPU pod here; say HOST:PORT,COUNT,INDEX"
            raise ConfigError(f"--distributed {distributed}: {reason}") from why
    try:
        on_cpu = jax.default_backend() == "cpu"
    except RuntimeError as why:  # e.g. JAX_PLATFORMS names a backend that is not installed
        raise ConfigError(f"JAX found no usable device: {str(why).splitlines()[0]}") from why
    if on_cpu:
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let glibc reuse large buffers. By default each temporary of a step is mapped and faulted in anew, which on two cores
    made small-block attention up to twice as slow."""
    import ctypes

    M_MMAP_THRESHOLD = -3
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
