"""One writer at a time for the output folder of a run and for a results file. Begin with `only_writer`.

The lock is a JSON file that names its holder. While a process holds it, it also has an flock on the file, which the
kernel drops when the process ends, however it ends. A lock file without an flock is therefore stale, and the next
process takes it over. Two cases need more care:

- The holder may run on another machine, and not every network file system passes flocks on. A holder renews the time
  of its file every BEAT seconds, and one that has not done so for SILENCE seconds counts as ended. Clocks are not
  compared, because those of two machines differ.
- A file system may have no flock. The file is then created exclusively, and the holder is judged by its pid and the
  start time of that pid, because pids are used again.
"""

import contextlib
import errno
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dms_jax.errors import ConfigError
from dms_jax.files import check_target

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BEAT = 5.0  # seconds between two signs of life of a holder
SILENCE = 30.0  # seconds without a sign of life after which a holder on another machine counts as ended
NOT_SUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Holder(NamedTuple):
    """The process in a lock file."""

    host: str
    pid: int
    start: str  # when the process started, in ticks of its machine; "" where the system does not say
    machine: str  # the running kernel and the pid namespace: what makes pids comparable; "" if unknown
    nonce: str  # differs for each time that a lock is taken

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def only_writer(target: str | os.PathLike[str], way_out: str, *, is_folder: bool = False) -> Iterator[None]:
    """Hold the lock of a file, which may not exist yet, or of a folder, which is made, while the body runs.

    If another process holds it, ConfigError names that process; `way_out` ends the message. A stale lock is taken over,
    which is reported on stderr. The lock file of a folder is `run.lock` in it, that of a file is `FILE.lock`.
    """
    target = Path(target)
    path = target / "run.lock" if is_folder else target.with_name(f"{target.name}.lock")
    me = Holder(platform.node(), os.getpid(), _start_of(os.getpid()), _machine(), uuid.uuid4().hex)
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        if not is_folder:
            check_target(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        check_target(path)
        handle = _acquire(path, target, me, way_out)
    except (OSError, ValueError) as why:
        if isinstance(why, ConfigError):
            raise
        reason = getattr(why, "strerror", None) or why
        raise ConfigError(f"cannot write to {path.parent}: {reason}; {way_out}") from why
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(handle, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        with contextlib.suppress(OSError, ConfigError):
            if _read(path) == me:  # not if this process was suspended for so long that another one has taken over
                path.unlink()  # before closing, which drops the flock
        os.close(handle)
        with contextlib.suppress(OSError):  # they stay if the body has put something into them
            for folder in made:
                folder.rmdir()


def _acquire(path: Path, target: Path, me: Holder, way_out: str) -> int:
    """Return a handle of the lock file, which then names `me`."""
    while True:
        try:
            handle, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                handle, is_new = os.open(path, os.O_RDWR), False
            except FileNotFoundError:  # released just now
                continue
        try:
            if _take(handle, is_new, path, target, way_out):
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps({"dms_jax_lock": 1, **me._asdict()}).encode())
                if not _flock(handle):  # there are none; then another process may just have judged the same stale lock
                    time.sleep(0.2)
                if _read(path) != me:
                    raise _held(path, target, way_out)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _take(handle: int, is_new: bool, path: Path, target: Path, way_out: str) -> bool:
    """Return whether the opened lock file is ours now; False if it is gone, so that a new one can be made.

    Raises ConfigError if a live process holds it.
    """
    has_flock = _flock(handle)
    if has_flock is False:
        raise _held(path, target, way_out)
    if has_flock and not _same_file(handle, path):  # its holder has released it since it was opened
        return False
    if is_new and not has_flock:
        return True
    former = _read(path) if has_flock else _settled(path)
    if former is None and has_flock:  # new, or its holder was killed before it had written its name
        return True
    if _is_alive(former, path, bool(has_flock)):
        raise _held(path, target, way_out)
    if has_flock or _remove_stale(path, former):
        print(f"taking over {path} from {former or 'a process'}, which has ended", file=sys.stderr)
    return bool(has_flock)  # without, one of the processes that have come so far makes the new file


def _flock(handle: int) -> bool | None:
    """Lock an open file: True if this process has it, False if another has it, None if there are no flocks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as why:
        if why.errno in NOT_SUPPORTED:
            return None
        raise


def _is_alive(holder: Holder | None, path: Path, has_flock: bool) -> bool:
    """Decide whether the holder in a lock file still runs. `has_flock`: its flock is gone, as far as we can see."""
    if holder is not None and holder.machine and holder.machine.split("/")[0] == _machine().split("/")[0] and has_flock:
        return False  # one kernel keeps all flocks of its processes, in whatever container they run
    if holder is not None and holder.machine and holder.machine == _machine():
        return _start_of(holder.pid) == holder.start and _exists(holder.pid)
    print(f"waiting {SILENCE:g} s for a sign of life of {holder or 'the process'} in {path}", file=sys.stderr)
    seen, deadline = _time_of(path), time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENCE / 10))
        if _time_of(path) != seen:
            return True
    return False


def _remove_stale(path: Path, judged: Holder | None) -> bool:
    """Remove the lock file of a holder that has ended. False if another process has removed or replaced it."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    if _read(aside) != judged:
        os.rename(aside, path)
        return False
    aside.unlink()
    return True


def _read(path: Path) -> Holder | None:
    """Return the holder in a lock file; None if it is empty or gone. Refuse a file that is not a lock of ours."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        text = "\0"
    if not text:
        return None
    try:
        raw = json.loads(text)
        if raw.pop("dms_jax_lock") == 1:
            return Holder(**raw)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise ConfigError(f"{path} must be a lock of dms_jax, got another file; move it away")


def _settled(path: Path) -> Holder | None:
    """Return the holder in a lock file that another process has locked and may be about to write."""
    for _ in range(20):
        if (holder := _read(path)) is not None:
            return holder
        time.sleep(0.05)
    return None


def _held(path: Path, target: Path, way_out: str) -> ConfigError:
    holder = _settled(path) or "another process"
    return ConfigError(f"{target} is being written by {holder}; wait until it has ended, or {way_out}")


def _beat(handle: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(handle)


def _time_of(path: Path) -> int:
    """Return the time of the last sign of life. Opening the file makes a network file system ask its server."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user
    return True


def _start_of(pid: int) -> str:
    """Return the start time of a process, which tells it from a later process with the same pid."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _machine() -> str:
    """Return "KERNEL/NAMESPACE": which boot of which kernel this is, and in which namespace its pids count."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
