"""Shut one generated program in and run it. `code_runner` starts this file in a process of its own, so it imports
nothing from the package.

    python -I -B code_guard.py TOOL PROGRAM SECONDS MEMORY_BYTES FILE_BYTES FOLDER_BYTES FILES FOLDER PATH...

TOOL says what this process is in already. `unshare`: new namespaces, in which this process is number 1 and has all
rights; it builds a file system of the paths, forks, and waits for the program. `bwrap`: new namespaces and the file
system. `unconfined`: nothing. PROGRAM is the descriptor of a file that holds the program. It is emptied right before
the program begins, so that a file that is not empty says that something failed before.

All of this happens here and not between fork and exec, where code would be unsafe: the parent runs JAX, which has
threads.
"""

import ctypes
import errno
import os
import platform
import re
import resource
import runpy
import signal
import struct
import sys

NEW_ROOT = "/sys"  # a folder that every Linux has and that nothing below needs; the new root is mounted on it
NUM_THREADS = 64  # that the program may add to those that already run on the machine
MAX_PID = 400  # of processes and threads in the namespace, where the kernel has such a limit; it must be above 300

# From <sys/mount.h>, <linux/mount.h>, <linux/prctl.h> and <linux/capability.h>
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MNT_DETACH = 2, 4, 4096, 16384, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY, ATTR_NOSUID = 442, -100, 0x8000, 1, 2
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 4, 22, 38, 2
CAPABILITY_VERSION = 0x20080522

# Calls that a confined program is refused, with their numbers on x86_64 and on aarch64. They start processes and
# programs, each of which would have the whole memory for itself; open sockets, of which some (AF_VSOCK) ignore network
# namespaces; hold memory that no limit counts; and reach keys, other processes or parts of the kernel.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, and AUDIT_ARCH
CLONE, CLONE3, CLONE_THREAD = (56, 220), (435, 435), 0x10000
REFUSED = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "socket": (41, 198),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """Call a function of the C library. Raises OSError."""
    if getattr(LIBC, name)(*arguments):
        raise OSError(f"{name}: {os.strerror(ctypes.get_errno())}")


def make_root(paths: list[str], folder: str, size: int, files: int) -> None:
    """Go to an empty `folder` of bounded size, in a file system that has only `paths` besides and cannot be changed."""
    inside = lambda path: (NEW_ROOT + path).encode()
    call("mount", b"tmpfs", NEW_ROOT.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755")
    for path in paths:
        if os.path.isdir(path):
            os.makedirs(inside(path), exist_ok=True)
        else:
            os.makedirs(os.path.dirname(inside(path)), exist_ok=True)
            open(inside(path), "w").close()
        call("mount", path.encode(), inside(path), None, MS_BIND | MS_REC, None)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", inside(f"/dev/{name}"))
    os.mkdir(inside("/proc"))
    os.mkdir(inside(folder))
    call("mount", b"proc", inside("/proc"), b"proc", MS_NOSUID | MS_NODEV, b"subset=pid")
    read_only = struct.pack("4Q", ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, NEW_ROOT.encode(), AT_RECURSIVE, read_only, len(read_only))
    options = f"size={size},nr_inodes={files},mode=700".encode()
    call("mount", b"tmpfs", inside(folder), b"tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(NEW_ROOT)
    call("pivot_root", b".", b".")  # puts the old root on top of the new one
    call("umount2", b".", MNT_DETACH)
    os.chdir(folder)


def limit_numbers() -> None:
    """Limit the processes and threads of this namespace where RLIMIT_NPROC does not, because the user is root."""
    with open("/proc/self/uid_map") as file:
        is_root = file.read().split()[1] == "0"
    if is_root and tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 14):
        with open("/proc/sys/kernel/pid_max", "w") as file:  # older kernels have one for the whole machine
            file.write(str(MAX_PID))


def supervise(descriptor: int, seconds: int) -> None:
    """Fork, and return in the child. The parent waits for the child and exits with its status, as a shell reports it;
    then the kernel kills everything else in the namespace."""
    child = os.fork()
    if not child:
        return
    os.close(descriptor)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program cannot look into this process
    drop_rights()
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + signal.SIGKILL))  # if nobody is left to kill us
    signal.alarm(seconds + 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def drop_rights() -> None:
    """Give up all capabilities for good, and let the kernel refuse some calls."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("capset", struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24))
    code = ctypes.create_string_buffer(call_filter(platform.machine()))
    program = struct.pack("HP", (len(code) - 1) // 8, ctypes.addressof(code))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def call_filter(machine: str) -> bytes:
    """Return the BPF program that refuses calls; see seccomp(2)."""
    if machine not in MACHINES:
        raise OSError(f"the calls of a program are filtered on {' and '.join(MACHINES)} only, this is {machine}")
    column, architecture = MACHINES[machine]
    load, equal, at_least, has_bits, end = 0x20, 0x15, 0x35, 0x45, 0x06
    number, arch, first_argument = 0, 4, 16  # offsets in struct seccomp_data
    kill, allow = 0x80000000, 0x7FFF0000
    refuse = lambda code: 0x50000 | code
    step = lambda code, value, if_true=0, if_false=0: struct.pack("HBBI", code, if_true, if_false, value)
    steps = [step(load, arch), step(equal, architecture, 1), step(end, kill), step(load, number)]
    steps += [step(at_least, 0x40000000, 0, 1), step(end, refuse(errno.EPERM))]  # the x32 numbers of x86_64
    # The flags of clone3 are in memory, which a filter cannot read; without it, the C library uses clone.
    steps += [step(equal, CLONE3[column], 0, 1), step(end, refuse(errno.ENOSYS))]
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            steps += [step(equal, numbers[column], 0, 1), step(end, refuse(errno.EPERM))]
    steps += [step(equal, CLONE[column], 1), step(end, allow), step(load, first_argument)]
    steps += [step(has_bits, CLONE_THREAD, 0, 1), step(end, allow), step(end, refuse(errno.EPERM))]
    return b"".join(steps)


def set_limits(cpu_seconds: int, memory_bytes: int, file_bytes: int) -> None:
    # The soft limit sends SIGXCPU, which tells the parent the reason; the hard limit sends SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    # RLIMIT_NPROC covers all processes and threads of the user, so add those that already run:
    # "0.5 0.4 0.3 2/1234 ...".
    with open("/proc/loadavg") as file:
        tasks = int(file.read().split()[3].partition("/")[2]) + NUM_THREADS
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    for limit, value in (
        (resource.RLIMIT_NPROC, tasks if hard == resource.RLIM_INFINITY else min(tasks, hard)),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),  # also limits the output, which goes to a file
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def main() -> None:
    tool, *numbers = sys.argv[1:8]
    descriptor, seconds, memory, file_size, folder_size, files = map(int, numbers)
    set_limits(seconds, memory, file_size)
    if tool == "unshare":
        limit_numbers()
        make_root(sys.argv[9:], sys.argv[8], folder_size, files)
        supervise(descriptor, seconds)
    if tool != "unconfined":
        drop_rights()
    with open(descriptor, "r+", encoding="utf-8") as source, open("program.py", "w", encoding="utf-8") as program:
        program.write(source.read())
        source.truncate(0)
    sys.argv = ["program.py"]
    runpy.run_path("program.py", run_name="__main__")


if __name__ == "__main__":
    main()
