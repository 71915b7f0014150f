"""What fits when a setting does not: settings nearby, the least intrusive change first, by the estimate and then by the compiler."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from dms_jax.sharding import LOGICAL_TO_MESH
from dms_jax.target_hardware import larger
from train.step_plan import Setting, planned

MOST_TRIES = 3  # settings that are compiled
SHORTEST = 1024  # tokens of a row
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
            return {"change": change, "hardware": other.hardware.name, **other.described, "seconds_per_step": found["seconds_per_step"],
                    "total_bytes_per_device": found["bytes_per_device"]["total"]}  # fmt: skip
    return None


def nearby(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """In ORDER, each change together with those before it, except that shorter rows and more devices start from the mesh that was given."""
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
    yield from _other_meshes(current, said)
    shorter = current
    while shorter.length > SHORTEST:
        shorter = dataclasses.replace(shorter, length=max(SHORTEST, shorter.length // 2))
        yield said(length=str(shorter.length)), shorter
    while (hardware := larger(current.hardware)) is not None:
        factor = hardware.count // current.hardware.count
        current = dataclasses.replace(current, hardware=hardware)
        for mesh in _enlarged(current.mesh, factor):
            # As many rows a step as before, all devices busy.
            if current.batch % mesh[0] == 0:
                accumulate = max(1, current.accumulate // factor) if mesh[0] != current.mesh[0] else current.accumulate
                bigger = dataclasses.replace(current, mesh=mesh, accumulate=accumulate)
                yield said(hardware=hardware.name, mesh=bigger.described["mesh"], accumulate=str(accumulate)), bigger
        current = dataclasses.replace(current, mesh=mesh)


def _other_meshes(setting: Setting, said: Callable[..., str]) -> Iterator[tuple[str, Setting]]:
    """Fewer rows at a time: their heads, then their length, over the devices that this frees."""
    data, model, *context = setting.mesh
    heads, length = [], []
    while data % 2 == 0 and model * 2 <= setting.config.num_q_heads:
        data, model = data // 2, model * 2
        heads.append((data, model, *context))
    if LOGICAL_TO_MESH["length"]:  # rows can be split
        data, model, parts = *setting.mesh[:2], setting.split.context
        while data % 2 == 0:
            data, parts = data // 2, parts * 2
            length.append((data, model, parts))
    for mesh in heads + length:
        if setting.batch % mesh[0] == 0:
            moved = dataclasses.replace(setting, mesh=mesh, accumulate=setting.batch // mesh[0])
            yield said(mesh=moved.described["mesh"], accumulate=str(moved.accumulate)), moved
