"""What fits when a setting does not: settings nearby, the least intrusive change first, by the estimate and then by the compiler."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from dms_jax.planning.hardware import Hardware, larger
from dms_jax.sharding import LOGICAL_TO_MESH
from dms_jax.training.planning.step_plan import Setting, planned

MOST_TRIES = 3  # settings that are compiled
SHORTEST = 1024  # tokens of a row
ROWS_CAN_BE_SPLIT = bool(LOGICAL_TO_MESH["length"])  # over a context axis
ORDER = "remat, accumulate, more of the mesh for the model axis, then for the context axis, shorter rows, more devices"


def nearest(setting: Setting, analytic: bool, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The first setting nearby that fits, by the estimate and, where there is a compiler, by it too; None when none does."""
    tried = 0
    for change, other in nearby(setting):
        if other.problem() is not None:
            continue
        # A CPU's devices are those that this process has: it compiles at once.
        found = planned(other, True) if setting.hardware.kind != "cpu" else None
        if found is not None and not found["fits"]:
            continue
        if not analytic or found is None:
            if (tried := tried + 1) > MOST_TRIES:
                return None
            say(f"compiling with {change}")
            found = planned(other, analytic)
        if found["fits"]:
            return {
                "change": change,
                "hardware": other.hardware.name,
                **other.described,
                "seconds_per_step": found["seconds_per_step"],
                "total_bytes_per_device": found["bytes_per_device"]["total"],
            }
    return None


def nearby(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """In ORDER: remat and accumulate stay changed, the others are tried one at a time. The rows of a step stay as many."""
    changes: dict[str, str] = {}

    def said(**more: str) -> str:
        return ", ".join(f"{name}={value}" for name, value in (changes | more).items())

    current = setting
    if current.remat != "full":
        current, changes["remat"] = dataclasses.replace(current, remat="full"), "full"
        yield said(), current
    while current.batch % (current.split.data * current.accumulate * 2) == 0:
        current = dataclasses.replace(current, accumulate=current.accumulate * 2)
        changes["accumulate"] = str(current.accumulate)
        yield said(), current
    for other in _on(current, current.hardware, _regrouped(current)):
        yield said(mesh=other.described["mesh"], accumulate=str(other.accumulate)), other
    shorter = current
    while shorter.length > SHORTEST:
        shorter = dataclasses.replace(shorter, length=max(SHORTEST, shorter.length // 2))
        yield said(length=str(shorter.length)), shorter
    hardware = current.hardware
    while (hardware := larger(hardware)) is not None:
        for other in _on(current, hardware, _enlarged(current, hardware.count // current.hardware.count)):
            yield said(hardware=hardware.name, mesh=other.described["mesh"], accumulate=str(other.accumulate)), other


def _on(setting: Setting, hardware: Hardware, meshes: Iterator[tuple[int, ...]]) -> Iterator[Setting]:
    """The setting on each of `meshes`, one row at a time, where its rows and the model's heads can be divided so."""
    for mesh in meshes:
        if setting.batch % mesh[0] == 0 and mesh[1] <= setting.config.num_q_heads:
            yield dataclasses.replace(setting, hardware=hardware, mesh=mesh, accumulate=setting.batch // mesh[0])


def _regrouped(setting: Setting) -> Iterator[tuple[int, ...]]:
    """As many devices for fewer rows at a time: their heads are shared out, then their length."""
    data, model, *context = setting.mesh
    halvings = [2**i for i in range(1, data.bit_length()) if data % 2**i == 0]
    yield from ((data // n, model * n, *context) for n in halvings)
    if ROWS_CAN_BE_SPLIT:
        yield from ((data // n, model, setting.split.context * n) for n in halvings)


def _enlarged(setting: Setting, factor: int) -> Iterator[tuple[int, ...]]:
    data, model, *context = setting.mesh
    yield data * factor, model, *context
    yield data, model * factor, *context
    if ROWS_CAN_BE_SPLIT:
        yield data, model, setting.split.context * factor
