"""Runs generated programs: a fresh Python process each, in an empty folder, under limits.

What it gives: an isolated interpreter (-I) with an empty environment, no terminal and no open files of ours; a temporary folder that
is removed; limits of CPU and wall time, memory, file and output size and threads; at the end the whole process group is killed.
Starting processes, using the network and changing files outside the folder is refused as far as it goes through Python.

What it is not: a sandbox. It keeps accidents of a language model small. A program that means harm can get around it (through
`ctypes`, say), can read every file that you can read, and as root is under no limit of processes. Against malice, run the whole
evaluation in a container or a virtual machine without network. Linux only.
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
    seconds: float = 10.0  # wall time; of CPU time a second more
    memory_mib: int = 2048  # address space
    output_mib: int = 16  # each file, and the output


LIMITS = Limits()


class Outcome(NamedTuple):
    verdict: str  # "passed": it ended by itself, without an error; "failed: why"; "timed out"
    output: str


def require_run_code(name: str, options: TaskOptions) -> None:
    """Raises ConfigError unless the user has said that generated code may run."""
    if not options.run_code:
        raise ConfigError(
            f"{name} runs the programs that the model writes on this machine, each in a subprocess with limits of time, memory and files, "
            "which is no sandbox; allow it with --run-code"
        )
    if sys.platform != "linux":
        raise ConfigError(f"{name} runs generated code on Linux only, this is {sys.platform}; use a container")


def run_program(program: str, stdin: str = "", limits: Limits = Limits()) -> Outcome:  # frozen
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
    """The verdict of a program that ends with its tests: they count as passed only if its last line was reached."""
    token = secrets.token_hex(16)  # a program that exits early cannot have printed it
    outcome = run_program(f"{program}\n__import__('sys').stdout.write({token!r})\n", limits=limits)
    if outcome.verdict == PASSED and not outcome.output.endswith(token):
        return "failed: it ended before its tests did"
    return outcome.verdict


def _kill_group(process: subprocess.Popen) -> None:
    """Ends the process and what it has started, and waits for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # start_new_session made it the leader
    process.wait()


def generated_code(text: str) -> str:
    """The program in an answer: the last fenced block, also one that was cut off; without a fence, all of it."""
    text = after_thinking(text)
    parts = text.split("```")
    if len(parts) == 1:
        return text.rstrip()
    block = parts[-2] if len(parts) % 2 else parts[-1]  # an even number of parts leaves the last block open
    language, _, code = block.partition("\n")
    return (code if re.fullmatch(r"\s*\w*\s*", language) else block).rstrip()
