"""One mutated input: made from (target, seed), read under a deadline and a memory limit, and judged.

A case is right when the reader refuses it with one ConfigError line that says where, or when what was read is what the files say:
the same as before the damage, or what an independent reading of the damaged files gives. Nothing on disk may have changed.
"""

import contextlib
import hashlib
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dms_jax.command import one_line
from dms_jax.errors import ConfigError

DEADLINE = 20  # seconds for one input; they take milliseconds, a loaded machine seconds
MEMORY = 2 * 2**30  # bytes of address space beyond what the process has
SAME, AS_WRITTEN, REFUSED = "same result", "read as written", "refused"


class Target(NamedTuple):
    """A kind of input, and how it is read."""

    name: str
    count: int  # inputs of the whole suite
    make: Callable[[Path], None]  # write a good input into an empty folder
    mutate: Callable[[random.Random, Path], str]  # damage it, say how
    read: Callable[[Path], Any]  # as a command would; what it means, as plain comparable values
    means: Callable[[Path], Any] | None = (
        None  # the same by independent means; None: the result must be that of the good input
    )
    names: str = ""  # what each message has to contain; "": the folder's path


class Wrong(AssertionError):
    """A traceback, a hang, a silent wrong result, a changed file."""

    def __init__(self, text: str):
        super().__init__(text.encode(errors="backslashreplace").decode())  # half characters would break the test report


class Late(BaseException):
    """Not an Exception, so that no boundary swallows it."""


def run_case(target: Target, seed: int, good: Path, folder: Path) -> tuple[str, str]:
    """(outcome, what was done and said) of one seed. `good` holds the input, `folder` is made for the damaged copy."""
    shutil.copytree(good, folder, symlinks=True)
    how = target.mutate(random.Random(f"{target.name}/{seed}"), folder)
    before = listing(folder)
    how = one_line(how, 200)
    case = f"{target.name} {seed} ({how})"
    try:
        with limits():
            got = target.read(folder)
    except ConfigError as why:
        message = one_line(why)
        if (target.names or str(folder)) not in message:
            raise Wrong(f"{case}: the message does not say where: {message[:300]}") from why
        outcome = REFUSED, f"{how} -> {message}"
    except Late:
        raise Wrong(f"{case}: still running after {DEADLINE} s") from None
    except Exception as why:
        raise Wrong(f"{case}: {type(why).__name__}: {str(why)[:300]}") from why
    else:
        if got == target.read(good):
            outcome = SAME, how
        else:
            try:
                wanted = target.means(folder) if target.means else None
            except Exception as why:
                raise Wrong(
                    f"{case}: accepted, but read on its own it is none: {type(why).__name__} {why}"[:400]
                ) from why
            if got != wanted:
                raise Wrong(f"{case}: silently read as something else: {difference(got, wanted)}")
            outcome = AS_WRITTEN, how
    if listing(folder) != before:
        raise Wrong(f"{case}: reading changed the files")
    shutil.rmtree(folder)
    return outcome


def difference(got: Any, wanted: Any) -> str:
    if isinstance(got, dict) and isinstance(wanted, dict):
        keys = [key for key in {**got, **wanted} if got.get(key, "absent") != wanted.get(key, "absent")]
        return "; ".join(
            f"{key}: {str(got.get(key, 'absent'))[:80]} for {str(wanted.get(key, 'absent'))[:80]}" for key in keys[:4]
        )
    return f"{str(got)[:200]} for {str(wanted)[:200]}"


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """A deadline and a memory limit for what runs inside."""

    def late(signum, frame):
        raise Late

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def listing(folder: Path) -> dict[str, str]:
    """Every path below, with what it is: a link's target, a file's hash."""
    found = {}
    for base, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(base, name)
            found[str(path.relative_to(folder))] = (
                f"link to {os.readlink(path)}"
                if path.is_symlink()
                else "folder"
                if path.is_dir()
                else hashlib.sha256(path.read_bytes()).hexdigest()
            )
    return found


def tally(outcomes: dict[str, list[str]]) -> str:
    """A table of target and outcome -> number of inputs."""
    kinds = (REFUSED, SAME, AS_WRITTEN)
    rows = [(name, len(found), *(found.count(kind) for kind in kinds)) for name, found in sorted(outcomes.items())]
    rows.append(("all", *(sum(row[i] for row in rows) for i in range(1, 5))))
    lines = [
        "| input | mutated | refused | harmless: same result | harmless: read as written |",
        "|---|---:|---:|---:|---:|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])
