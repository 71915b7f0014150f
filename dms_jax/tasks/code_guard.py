"""Run one generated program under limits. `code_runner` starts this file in a process of its own, so it imports nothing
from the package.

    python -I -B code_guard.py PROGRAM CPU_SECONDS MEMORY_BYTES FILE_BYTES

The limits are set here and not between fork and exec, where code would be unsafe: the parent runs JAX, which has
threads.
"""

import os
import resource
import runpy
import sys

NUM_THREADS = 64  # that the program may add to those that already run on the machine
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = (
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
    "socket.bind",
)
REFUSED += ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen")
CHANGES = (
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
)
CHANGES += ("shutil.move", "shutil.rmtree")


def set_limits(cpu_seconds: int, memory_bytes: int, file_bytes: int) -> None:
    # The soft limit sends SIGXCPU, which tells the parent the reason; the hard limit sends SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),  # also limits the output, which goes to a file
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    # RLIMIT_NPROC covers all processes and threads of the user, so add those that already run:
    # "0.5 0.4 0.3 2/1234 ...".
    with open("/proc/loadavg") as file:
        tasks = int(file.read().split()[3].partition("/")[2]) + NUM_THREADS
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    tasks = tasks if hard == resource.RLIM_INFINITY else min(tasks, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (tasks, tasks))  # not enforced for root


def refuse_outside(folder: str):
    """Make an audit hook that refuses Python's own ways to start processes, to use the network and to change files
    outside the folder."""

    def is_outside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # an open file, or not a path at all
        real = os.path.realpath(os.fsdecode(path))
        return real != "/dev/null" and os.path.commonpath([real, folder]) != folder

    def hook(event: str, arguments: tuple) -> None:
        if event in REFUSED:
            raise PermissionError(f"generated code may not use {event}")
        if (event == "open" and arguments[2] & WRITES and is_outside(arguments[0])) or (
            event in CHANGES and any(map(is_outside, arguments))
        ):
            raise PermissionError(f"generated code may not change files outside its folder ({event})")

    return hook


def main() -> None:
    program, *limits = sys.argv[1:]
    set_limits(*map(int, limits))
    import _posixsubprocess  # multiprocessing calls it without an audit event

    def refuse(*arguments):
        raise PermissionError("generated code may not start processes")

    _posixsubprocess.fork_exec = refuse
    sys.argv = [program]
    sys.addaudithook(refuse_outside(os.path.realpath(os.getcwd())))
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
