"""One damaged input: derived from (target, seed), read under a deadline and a memory limit, and checked.

A case passes if the reader refuses it with a one-line ConfigError that names the place, or if the result is right:
equal to the result before the damage, or to an independent reading of the damaged files. Reading must not change any
file.
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

DEADLINE = 20  # seconds for one input, which takes milliseconds on an idle machine and seconds on a loaded one
MEMORY = 2 * 2**30  # bytes of address space that reading may add to the process
SAME, AS_WRITTEN, REFUSED = "same result", "read as written", "refused"


class Target(NamedTuple):
    """A kind of input, with functions that write, damage and read it."""

    name: str
    count: int  # seeds in the whole suite
    make: Callable[[Path], None]  # writes an undamaged input into an empty folder
    mutate: Callable[[random.Random, Path], str]  # damages it and describes the damage
    read: Callable[[Path], Any]  # reads it like a command; the result consists of plain comparable values
    means: Callable[[Path], Any] | None = None  # reads it independently; None: the result must equal the undamaged one
    names: str = ""  # a text that each message must contain; "": the path of the folder


class Wrong(AssertionError):
    """The failure of a case: a traceback, a hang, a silently wrong result, or a changed file."""

    def __init__(self, text: str):
        super().__init__(text.encode(errors="backslashreplace").decode())  # lone surrogates would break the test report


class Late(BaseException):
    """The deadline has passed. Not an Exception, so that no `except Exception` swallows it."""


def run_case(target: Target, seed: int, good: Path, folder: Path) -> tuple[str, str]:
    """Run one seed and return the outcome and a description.

    `good` holds the input, `folder` is created for the damaged copy.
    """
    shutil.copytree(good, folder, symlinks=True)
    how = target.mutate(random.Random(f"{target.name}/{seed}"), folder)
    before = listing(folder)
    how = one_line(how, 200)
    case = f"{target.name} {seed} ({how})"
    try:
        with limits():
            got = target.read(folder)
    except (ConfigError, UserWarning) as why:  # what is only said is raised here, because warnings are errors in tests
        message = one_line(why)
        if (target.names or str(folder)) not in message:
            raise Wrong(f"{case}: the message does not name the place: {message[:300]}") from why
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
                    f"{case}: accepted, but the independent reader refuses it: {type(why).__name__} {why}"[:400]
                ) from why
            if got != wanted:
                raise Wrong(f"{case}: silently misread: {difference(got, wanted)}")
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
    """Limit the time and the memory of the code inside."""

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
    """Every path in a folder with its content: the target of a link, the hash of a file."""
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
    """A table with the number of inputs by target and outcome."""
    kinds = (REFUSED, SAME, AS_WRITTEN)
    rows = [(name, len(found), *(found.count(kind) for kind in kinds)) for name, found in sorted(outcomes.items())]
    rows.append(("all", *(sum(row[i] for row in rows) for i in range(1, 5))))
    lines = [
        "| input | mutated | refused | harmless: same result | harmless: read as written |",
        "|---|---:|---:|---:|---:|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])
