"""Run generated programs, each in a fresh Python process, in an empty folder, under limits. Linux only.

A program gets an isolated interpreter (-I) with an empty environment, without a terminal and without our open files. It
runs in a temporary folder, which is removed afterwards, with limits on CPU and wall time, memory, threads, and the size
of files and output. At the end its whole process group is killed. Attempts to start processes, to use the network or to
change files outside the folder are refused if they go through Python.

This is not a sandbox: it protects from accidents, not from attacks. A malicious program can get around it, for example
through `ctypes`; it can read every file that you can read; and as root it has no limit on processes. If programs may be
malicious, run the whole evaluation in a container or a virtual machine without network.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dms_jax.errors import ConfigError
from dms_jax.tasks.answers import after_thinking
from dms_jax.tasks.problem import TaskOptions

GUARD = Path(__file__).with_name("code_guard.py")
PASSED, TIMED_OUT = "passed", "timed out"


@dataclass(frozen=True)
class Limits:
    """The resources that one program may use."""

    seconds: float = 10.0  # wall time; the limit on CPU time is one second more
    memory_mib: int = 2048  # address space
    output_mib: int = 16  # size of each file, and of the output


class Outcome(NamedTuple):
    """How a program ended, and what it printed."""

    verdict: str  # "passed" (it ended by itself and without an error), "failed: REASON" or "timed out"
    output: str


def require_run_code(name: str, options: TaskOptions) -> None:
    """Raise ConfigError unless the user has allowed generated code to run."""
    if not options.run_code:
        raise ConfigError(
            f"{name} runs programs that the model writes, on this machine, each in a subprocess with limits on time, "
            "memory and files, which is not a sandbox; give --run-code to allow it"
        )
    if sys.platform != "linux":
        raise ConfigError(f"{name} must run on Linux, got {sys.platform}; use a container or a virtual machine")


def run_program(program: str, stdin: str = "", limits: Limits = Limits()) -> Outcome:
    """Run a program until it ends or reaches a limit."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as outside:
        folder = Path(outside, "folder")
        folder.mkdir()
        source = folder / "program.py"
        source.write_text(program, encoding="utf-8", errors="replace")
        Path(outside, "in").write_text(stdin, encoding="utf-8", errors="replace")
        bounds = (int(limits.seconds) + 1, limits.memory_mib << 20, limits.output_mib << 20)
        with (
            open(Path(outside, "in"), "rb") as given,
            open(Path(outside, "out"), "wb") as out,
            open(Path(outside, "err"), "wb") as err,
        ):
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "utf8", str(GUARD), source.name, *map(str, bounds)],
                stdin=given,
                stdout=out,
                stderr=err,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                status = process.wait(limits.seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _kill_group(process)
        output = Path(outside, "out").read_text(encoding="utf-8", errors="replace")
        errors = Path(outside, "err").read_text(encoding="utf-8", errors="replace")
    if status is None or status == -signal.SIGXCPU:
        return Outcome(TIMED_OUT, output)
    if status == 0:
        return Outcome(PASSED, output)
    why = (
        f"killed by signal {-status}"
        if status < 0
        else next(reversed(errors.strip().splitlines()), f"exit status {status}")
    )
    return Outcome(f"failed: {why[:200]}", output)


def run_tests(program: str, limits: Limits = Limits()) -> str:
    """Return the verdict on a program whose tests are at its end. It passes only if it reaches its last line."""
    token = secrets.token_hex(16)  # a program that exits early cannot have printed it
    outcome = run_program(f"{program}\n__import__('sys').stdout.write({token!r})\n", limits=limits)
    if outcome.verdict == PASSED and not outcome.output.endswith(token):
        return "failed: it ended before its tests did"
    return outcome.verdict


def _kill_group(process: subprocess.Popen) -> None:
    """Kill the process and everything it has started, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # start_new_session made it the leader
    process.wait()


def generated_code(text: str) -> str:
    """Return the program in an answer: the last fenced block, even if it is not closed, or else the whole answer."""
    text = after_thinking(text)
    parts = text.split("```")
    if len(parts) == 1:
        return text.rstrip()
    block = parts[-2] if len(parts) % 2 else parts[-1]  # an even number of parts leaves the last block open
    language, _, code = block.partition("\n")
    return (code if re.fullmatch(r"\s*\w*\s*", language) else block).rstrip()
