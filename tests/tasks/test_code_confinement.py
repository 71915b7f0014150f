"""Confinement of generated programs: each way out is tried, and the outside must stay as it was."""

import os
import platform
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dms_jax.command import run_command
from dms_jax.commands import evaluate, hyperscale
from dms_jax.errors import ConfigError
from dms_jax.tasks import code_runner
from dms_jax.tasks.code_runner import Limits, Outcome, run_program, run_tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="generated code runs on Linux only")
SHORT = Limits(seconds=4, memory_mib=512, output_mib=1, folder_mib=4, files=200)


@pytest.fixture(params=["bwrap", "unshare"])
def tool(request, monkeypatch):
    """Each tool that works on this machine, which is found out by using it."""
    if request.param == "bwrap" and os.geteuid() == 0:
        pytest.skip("bubblewrap is not used by root")
    try:
        code_runner._run(request.param, "", "", Limits())
    except ConfigError as why:
        pytest.skip(f"this machine cannot confine a program with {why}")
    monkeypatch.setattr(code_runner, "confining_tool", lambda: request.param)
    return request.param


FILES = [
    "open({kept}, 'w')",
    "open({new}, 'w')",
    "import os; os.remove({kept})",
    "import os; os.remove('kept', dir_fd=os.open({folder}, os.O_RDONLY))",
    "import os; os.open('kept', os.O_WRONLY | os.O_TRUNC, dir_fd=os.open({folder}, os.O_RDONLY))",
    "import os; d = os.open({folder}, os.O_RDONLY); os.rename('kept', 'new', src_dir_fd=d, dst_dir_fd=d)",
    "import sqlite3; sqlite3.connect({new}).execute('create table a(b)')",
    "import sqlite3; c = sqlite3.connect(':memory:'); c.execute('create table a(b)'); c.execute('vacuum into \"new\"');"
    "import os; os.rename('new', {new})",
    "import os; os.mkfifo({new})",
    "import os; os.chmod({kept}, 0)",
    "import os; os.fchmod(os.open({kept}, os.O_RDONLY), 0o777)",
    "import os; os.setxattr({kept}, 'user.a', b'b')",
    "import os; os.utime({kept}, (0, 0))",
    "import os; os.symlink({kept}, 'l'); open('l', 'r+').write('x')",
    "import os; os.chdir({folder}); open('kept', 'w')",
    "import mmap, os; mmap.mmap(os.open({kept}, os.O_RDWR), 0)[0:1] = b'X'",
    "import os; os.link('/proc/self/fd/1', {new})",
    "import ctypes; c = ctypes.CDLL(None); c.system(b'echo x > ' + {kept}.encode()); raise SystemExit(1)",
    "import shutil; shutil.rmtree({folder})",
    "open({kept}).read()",  # other people's files cannot even be read
    "open('/etc/passwd')",
    "import os; os.listdir({home})",
]


@pytest.mark.parametrize("program", FILES)
def test_files_outside_are_out_of_reach(tmp_path, tool, program):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    before = (os.stat(kept), os.listxattr(kept), os.listdir(tmp_path))
    names = {"kept": kept, "new": tmp_path / "new", "folder": tmp_path, "home": os.path.expanduser("~/.cache")}
    for name, path in names.items():
        program = program.replace(f"{{{name}}}", repr(str(path)))
    assert run_program(program, limits=SHORT).verdict.startswith("failed: ")
    assert (os.stat(kept), os.listxattr(kept), os.listdir(tmp_path)) == before and kept.read_text() == "kept"


@pytest.mark.parametrize(
    "change",
    [
        "os.chmod('/dev/null', 0o666)",
        "os.chmod(sys.executable, os.stat(sys.executable).st_mode)",
        "os.utime(sys.prefix)",
        "open(os.__file__, 'a')",
        "os.rename('/bin/sh', '/bin/sh')",
        "os.mkdir('/new')",
        "os.mkdir('/dev/new')",
        "open('/proc/self/comm', 'w')",
        "os.rmdir(os.getcwd())",
    ],
)
def test_what_a_program_can_read_it_cannot_change(tool, change):
    """The changes change nothing, because without confinement they would be real."""
    verdict = run_program(f"import os, sys\n{change}", limits=SHORT).verdict
    assert any(text in verdict for text in ("Read-only file system", "resource busy", "PermissionError")), verdict


TRIES = """
import ctypes, os, resource, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
def tried(name, action):
    try:
        action()
    except (OSError, ValueError):
        return
    print('DONE', name)
"""
ACTIONS = {  # name -> what must raise OSError or ValueError
    "fork": "os.fork()",
    "fork of the C library": "call('fork')",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "os.execv('/bin/true', ['true'])",
    "tcp": "socket.create_connection(('127.0.0.1', {port}), 1)",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "unix": "socket.socket(socket.AF_UNIX)",
    "abstract unix": "socket.socket(socket.AF_UNIX).bind(chr(0) + 'x')",
    "vsock": "socket.socket(40, socket.SOCK_STREAM)",
    "netlink": "socket.socket(16, socket.SOCK_RAW)",
    "names": "socket.getaddrinfo('localhost.localdomain', 80)",
    "signal": "os.kill({pid}, 0)",
    "pidfd": "os.pidfd_open({pid})",
    "parent": "open('/proc/{pid}/environ', 'rb')",
    "supervisor": "open('/proc/1/mem', 'r+b')",
    "supervisor's memory": "open('/proc/1/environ')",
    "old root": "os.stat('/../etc/passwd')",
    "memory file": "os.memfd_create('x')",
    "shared memory": "call('shmget', 0, 4096, 0o1600)",
    "semaphores": "call('semget', 0, 9, 0o1600)",
    "messages": "call('msgget', 0, 0o1600)",
    "ptrace": "call('ptrace', 16, 1, 0, 0)",
    "mount": "call('mount', b'x', b'.', b'tmpfs', 0, None)",
    "remount": "call('mount', None, b'/', None, 4096 | 32, None)",
    "remount of Python": "call('mount', None, sys.prefix.encode(), None, 4096 | 32, None)",
    "umount": "call('umount2', b'/dev/null', 2)",
    "pivot_root": "call('pivot_root', b'.', b'.')",
    "chroot": "os.chroot('.')",
    "user namespace": "call('unshare', 0x10000000)",
    "namespace of the parent": "call('setns', os.open('/proc/1/ns/mnt', 0), 0)",
    "device": "os.mknod('dev', 0o60600, os.makedev(254, 0))",
    "core pattern": "open('/proc/sys/kernel/core_pattern', 'r+')",
    "sysrq": "open('/proc/sysrq-trigger', 'w')",
    "sys": "os.listdir('/sys/kernel')",
    "terminal": "os.open('/dev/tty', os.O_RDWR)",
    "host name": "socket.sethostname('x')",
    "another user": "os.setuid(4321)",
    "priority": "os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "memory limit": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "CPU limit": "resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
}


def test_network_processes_and_the_kernel_are_out_of_reach(tool):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        names = {"{port}": str(server.getsockname()[1]), "{pid}": str(os.getpid())}
        program = TRIES + "".join(f"tried({name!r}, lambda: {action})\n" for name, action in ACTIONS.items())
        for name, value in names.items():
            program = program.replace(name, value)
        if tool == "bwrap":  # its process 1 can be looked at, and holds nothing
            program = program.replace("open('/proc/1/environ')", "open('/proc/1/fd/3')")
        assert run_program(f"{program}print('all tried')", limits=SHORT) == ("passed", "all tried\n")
        with pytest.raises(BlockingIOError):
            server.accept()


def test_refused_system_calls_are_refused_by_number(tool):
    """Called directly, with arguments that do no harm, and by the second set of numbers of x86_64."""
    from dms_jax.tasks import code_guard

    column = code_guard.MACHINES[platform.machine()][0]
    numbers = {numbers[column]: "EPERM" for numbers in code_guard.REFUSED.values()}
    numbers |= {number | 0x40000000: "EPERM" for number in [*numbers, 39] if number}
    numbers |= {code_guard.CLONE[column]: "EPERM", code_guard.CLONE3[column]: "ENOSYS"}
    numbers.pop(None, None)
    program = (
        f"import ctypes, errno\nlibc, got = ctypes.CDLL(None, use_errno=True), {{}}\nfor number in {list(numbers)}:\n"
        "    got[number] = libc.syscall(number, 0, 0, 0, 0, 0) < 0 and errno.errorcode[ctypes.get_errno()]\nprint(got)"
    )
    assert run_program(program, limits=SHORT) == ("passed", f"{numbers}\n")


@pytest.mark.parametrize(
    "program, verdict",
    [
        ("for i in range(9): open(str(i), 'w').write('x' * (1 << 20))", "failed: OSError: [Errno 28]"),
        (
            "import os\nfor i in range(9): os.posix_fallocate(os.open(str(i), 66), 0, 1 << 20)",
            "failed: OSError: [Errno 28]",
        ),
        ("x = bytearray(1 << 30)", "failed: MemoryError"),
        ("import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(16)]", "failed: OSError: [Errno 12]"),
        ("import os\nwhile True: os.fork()", "failed: PermissionError"),
        ("import os; os.ftruncate(1, 1 << 30)", "failed: OSError: [Errno 27] File too large"),
    ],
)
def test_disk_memory_and_processes_are_bounded(tool, program, verdict):
    assert run_program(program, limits=SHORT).verdict.startswith(verdict)


def test_number_of_files_is_bounded_by_unshare(tool):
    program = "for i in range(300): open(str(i), 'w').close()"
    expected = "passed" if tool == "bwrap" else "failed: OSError: [Errno 28] No space left on device: '198'"
    assert run_program(program, limits=SHORT).verdict == expected  # the folder and program.py are two


def test_number_of_threads_is_bounded_without_a_trace_on_the_machine(tool):
    """For root by the namespace, on Linux 6.14 or later; else by a limit that counts all processes of the machine."""
    if os.geteuid() == 0 and tuple(map(int, platform.release().split(".")[:2])) < (6, 14):
        pytest.skip("this kernel cannot limit the threads of root")
    program = """
import threading, time
threading.stack_size(1 << 15)
try:
    for number in range(5000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
except RuntimeError as why:
    print(number, why)
"""
    before = Path("/proc/sys/kernel/pid_max").read_text()
    tasks = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    number, _, why = run_program(program).output.partition(" ")
    assert why == "can't start new thread\n" and int(number) < (400 if os.geteuid() == 0 else 2 * tasks + 64)
    assert Path("/proc/sys/kernel/pid_max").read_text() == before


def running(mark: str) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                found += [pid] if mark in file.read().split("\0") else []
        except OSError:  # it has ended
            continue
    return found


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize(
    "program", ["import time; time.sleep(60)", "import os; os.setsid(); input('a'); open(1).read()"]
)
def test_nothing_of_a_program_survives_it(tool, program):
    limits = Limits(seconds=1, memory_mib=512 + os.getpid() % 1000)
    run_program(program, limits=limits)
    assert until(lambda: not running(str(limits.memory_mib << 20)))


def test_program_does_not_survive_a_killed_evaluation(tool):
    limits = Limits(seconds=1, memory_mib=2000 + os.getpid() % 1000)
    code = (
        f"from dms_jax.tasks import code_runner as c\nc._run({tool!r}, 'import time; time.sleep(60)', '', c.{limits!r})"
    )
    evaluation = subprocess.Popen([sys.executable, "-c", code])
    mark = str(limits.memory_mib << 20)
    assert until(lambda: running(mark)), "it never ran"
    evaluation.send_signal(signal.SIGKILL)
    evaluation.wait()
    assert until(lambda: not running(mark))


def test_program_cannot_lock_us_out_of_its_output(tool):
    program = "import os; print('a', flush=True); os.fchmod(1, 0); os.chmod('.', 0); os.close(0); os.close(2)"
    assert run_program(program) == ("passed", "a\n")
    assert run_tests("import os; os.close(1)").startswith("failed")


def test_right_programs_pass_in_a_private_folder(tool):
    program = """
import asyncio, os, random, sys, tempfile, threading
import numpy
os.mkdir('a'); open('a/b', 'w').write('x'); os.rename('a/b', 'c'); os.remove('c')
with tempfile.TemporaryDirectory() as folder: open(folder + '/x', 'w').close()
threading.stack_size(1 << 28)
thread = threading.Thread(target=lambda: print(open('/dev/stdin').read()[::-1]))
thread.start(); thread.join()
asyncio.run(asyncio.sleep(0))
print(numpy.linalg.svd(numpy.eye(3))[1], os.path.getsize('/dev/null'), len(os.urandom(3)))
print(os.getcwd(), sorted(os.listdir()), set(os.environ) - {'LC_CTYPE', 'PWD'})
"""
    folder = code_runner.FOLDER
    assert run_program(program, "abc") == (
        "passed",
        f"cba\n[1. 1. 1.] 0 3\n{folder} ['a', 'program.py'] {{'OMP_NUM_THREADS'}}\n",
    )
    assert not os.path.exists(folder)


def fake_tools(monkeypatch, folder, script: str) -> None:
    """Let bwrap and unshare be a script, and nothing else be found."""
    for name in ("bwrap", "unshare"):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(code_runner, "confining_tool", code_runner.confining_tool.__wrapped__)


@pytest.mark.parametrize(
    "script, reason",
    [
        (
            "echo unshare: unshare failed: Operation not permitted >&2; exit 1",
            "unshare failed: Operation not permitted",
        ),
        ("exit 0", "did not begin"),  # it ran nothing
    ],
)
def test_machine_that_cannot_confine_is_refused_with_the_reason(tmp_path, monkeypatch, script, reason):
    fake_tools(monkeypatch, tmp_path, script)
    with pytest.raises(ConfigError, match=f"{reason}.*--run-code unconfined"):
        run_program("print(1)")
    assert run_program("print(1)", confined=False) == ("passed", "1\n")


@pytest.mark.parametrize(
    "main, options",
    [
        (evaluate.main, ["--tasks", "humaneval"]),
        (evaluate.main, ["--tasks", "copy,code"]),
        (hyperscale.main, ["--task", "code"]),
    ],
)
def test_commands_refuse_before_they_load_anything(tmp_path, monkeypatch, capsys, main, options):
    fake_tools(monkeypatch, tmp_path, "exit 1")
    command = ["--model", "no such model", *options]
    with pytest.raises(ConfigError, match="give --run-code"):
        main(command)
    with pytest.raises(SystemExit) as stop:
        run_command("evaluate", lambda: main([*command, "--run-code"]))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "unshare: " in lines[0] and "--run-code unconf" in lines[0]
    with pytest.raises(SystemExit):
        main([*command, "--run-code", "unconfine"])
    assert "'unconfined'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no such model"):
        main([*command, "--run-code", "unconfined"])
    assert capsys.readouterr().err.startswith("--run-code unconfined: ")


def test_unconfined_program_keeps_its_limits():
    limits = Limits(seconds=1, memory_mib=512, output_mib=1)
    outcome = lambda program: run_program(program, limits=limits, confined=False)
    assert outcome("import os; print(os.getpid() > 1, os.listdir())") == Outcome("passed", "True ['program.py']\n")
    assert outcome("x = bytearray(1 << 30)").verdict == "failed: MemoryError"
    assert outcome("open('x', 'w').write('x' * (2 << 20))").verdict == "failed: OSError: [Errno 27] File too large"
    started = time.monotonic()
    assert outcome("import os, time\nif os.fork() == 0: time.sleep(60)").verdict == "passed"
    assert outcome("import time; time.sleep(60)").verdict == "timed out"
    assert time.monotonic() - started < 20
