"""Run generated programs, each in a fresh Python process, in an empty folder, under limits. Linux only.

A program gets an isolated interpreter (-I) with an almost empty environment, without a terminal and without our open
files, and limits on CPU and wall time, memory, threads, and the size of each file and of the output. At the end it is
killed with everything that it has started.

A confined program also runs in namespaces of its own, made by bubblewrap if it is installed and works, else (and
always for root) by unshare(1). It sees Python and the libraries of the system, which it can only read, and its folder,
which is in memory and bounded; there are no other files, processes or networks. It has no capabilities, and `REFUSED`
of `code_guard` lists the system calls that it is refused. An unconfined program can do whatever the user can do; only
the limits remain.
"""

import contextlib
import functools
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dms_jax.errors import ConfigError, naming
from dms_jax.tasks.answers import after_thinking

GUARD = str(Path(__file__).with_name("code_guard.py"))
PASSED, TIMED_OUT = "passed", "timed out"
UNCONFINED = "unconfined"
FOLDER = "/generated-program"  # of a confined program; not in /tmp, where Python itself may be installed
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/alternatives", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}  # NumPy would start a thread for each core


@dataclass(frozen=True)
class Limits:
    """The resources that one program may use."""

    seconds: float = 10.0  # wall time; the limit on CPU time is one second more
    memory_mib: int = 2048  # address space
    output_mib: int = 16  # size of each file, and of the output
    folder_mib: int = 64  # size of all files of a confined program together
    files: int = 20_000  # their number, if unshare confines it


class Outcome(NamedTuple):
    """How a program ended, and what it printed."""

    verdict: str  # "passed" (it ended by itself and without an error), "failed: REASON" or "timed out"
    output: str


def require_run_code(name: str, run_code: bool | str) -> bool:
    """Return whether the programs of the task `name` are to be confined. Raises ConfigError unless the user has allowed
    them to run, and this machine can run them that way."""
    if run_code not in (True, UNCONFINED):
        raise ConfigError(
            f"{name} runs programs that the model writes, on this machine; give --run-code to allow that, confined"
        )
    if sys.platform != "linux":
        raise ConfigError(f"{name} must run on Linux, got {sys.platform}; use a container or a virtual machine")
    if run_code != UNCONFINED:
        with naming(f"{name}: --run-code"):
            confining_tool()
    return run_code != UNCONFINED


@functools.cache
def confining_tool() -> str:
    """Return the first of bubblewrap and unshare that can confine a program on this machine, by trying them. Raises
    ConfigError if none can."""
    reasons = []
    # Root owns the device files, and bubblewrap mounts them so that their owner can change their modes.
    for tool in ("bwrap", "unshare") if os.geteuid() else ("unshare",):
        try:
            _run(tool, "", "", Limits())
            return tool
        except (ConfigError, OSError) as why:
            reasons.append(str(why))
    raise ConfigError(
        f"this machine cannot confine programs ({'; '.join(reasons)}); allow user namespaces, "
        "or, in a container or a virtual machine that may be lost, give --run-code unconfined"
    )


def run_program(program: str, stdin: str = "", limits: Limits = Limits(), confined: bool = True) -> Outcome:
    """Run a program until it ends or reaches a limit. Raises ConfigError if it is to be confined and cannot be."""
    with naming("cannot run a generated program"):
        return _run(confining_tool() if confined else UNCONFINED, program, stdin, limits)


def _run(tool: str, program: str, stdin: str, limits: Limits) -> Outcome:
    """Run a program in the namespaces that `tool` makes, or unconfined."""
    # The files have no names, and stay open here whatever the program does to its own descriptors and their modes.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as source,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as given,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as err,
    ):
        for file, text in ((source, program or "\n"), (given, stdin)):
            file.write(text)
            file.seek(0)
        process = subprocess.Popen(
            _command(tool, source.fileno(), limits),
            stdin=given,
            stdout=out,
            stderr=err,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
            pass_fds=[source.fileno()],
        )
        deadline = time.monotonic() + limits.seconds
        try:
            while (status := process.poll()) is None and time.monotonic() < deadline:
                time.sleep(0.002)  # process.wait(timeout) sleeps for up to 50 ms
        finally:
            _kill_group(process)
        for file in (out, err):
            file.seek(0)
        output, errors = out.read(), err.read().strip().splitlines()
        began = not os.fstat(source.fileno()).st_size
    if not began:
        reason = errors[-1].removeprefix(f"{tool}: ") if errors else "the program did not begin"
        raise ConfigError(f"{tool}: {reason[:200]}")
    if status is not None and status < 0:
        status = 128 - status  # as a shell and the tools report a signal
    if status is None or status == 128 + signal.SIGXCPU:
        return Outcome(TIMED_OUT, output)
    if status == 0:
        return Outcome(PASSED, output)
    killed = 128 < status <= 128 + signal.SIGRTMAX
    why = f"killed by signal {status - 128}" if killed else errors[-1] if errors else f"exit status {status}"
    return Outcome(f"failed: {why[:200]}", output)


def _command(tool: str, source: int, limits: Limits) -> list[str]:
    """Return the command line that confines and runs the program in the open file `source`."""
    sizes = limits.memory_mib << 20, limits.output_mib << 20, limits.folder_mib << 20, limits.files
    numbers = map(str, (source, int(limits.seconds) + 1, *sizes))
    guard = [sys.executable, "-I", "-B", "-X", "utf8", GUARD, tool, *numbers]
    if tool == UNCONFINED:
        return guard
    path = shutil.which(tool)
    if path is None:
        raise ConfigError(f"{tool}: not installed")
    if tool == "unshare":
        spaces = ("--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--uts")
        return [path, *spaces, "--fork", "--kill-child", *guard, FOLDER, *_readable(), *DEVICES]
    options = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for name in _readable():
        options += ["--ro-bind", name, name]
    for name in DEVICES:
        options += ["--dev-bind", name, name]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        options += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    options += ["--proc", "/proc", "--remount-ro", "/proc", "--size", str(limits.folder_mib << 20), "--tmpfs", FOLDER]
    return [path, *options, "--remount-ro", "/", "--chdir", FOLDER, *guard]


@functools.cache
def _readable() -> tuple[str, ...]:
    """Return the files and folders that a confined program can read: Python, and the libraries of the system."""
    python = (sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix), os.path.realpath(sys.executable), GUARD)
    found: list[str] = []
    for path in filter(os.path.exists, (*SYSTEM, *python)):
        if not any(Path(path).is_relative_to(folder) for folder in found):
            found.append(path)
    return tuple(found)


def run_tests(program: str, limits: Limits = Limits(), confined: bool = True) -> str:
    """Return the verdict on a program whose tests are at its end. It passes only if it reaches its last line."""
    token = secrets.token_hex(16)  # a program that exits early cannot have printed it
    outcome = run_program(f"{program}\n__import__('sys').stdout.write({token!r})\n", "", limits, confined)
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
