"""Search for a nearby setting that fits when the given one does not, trying the least intrusive changes first.

A setting must fit according to the estimate and then, if a compiler is available, according to the compiler.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from dms_jax.planning.hardware import Hardware, larger
from dms_jax.sharding import LOGICAL_TO_MESH
from dms_jax.training.planning.step_plan import planned
from dms_jax.training.planning.step_setting import StepSetting

MAX_COMPILED = 3  # number of settings that are compiled before the search ends
MIN_LENGTH = 1024  # tokens of a row
ROWS_CAN_BE_SPLIT = bool(LOGICAL_TO_MESH["length"])  # whether a context axis can split rows


def nearest(setting: StepSetting, analytic: bool, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Describe the first nearby setting that fits, or return None. `say` reports each compilation."""
    num_compiled = 0
    for change, other in nearby(setting):
        if other.problem() is not None:
            continue
        # On a CPU, the estimate is not cheaper than compiling, because the time is measured in both cases.
        plan = planned(other, analytic=True) if setting.hardware.kind != "cpu" else None
        if plan is not None and not plan.value("fits"):
            continue
        if not analytic or plan is None:
            num_compiled += 1
            if num_compiled > MAX_COMPILED:
                return None
            say(f"compiling with {change}")
            plan = planned(other, analytic)
        if plan.value("fits"):
            return {
                "change": change,
                "hardware": other.hardware.name,
                **other.described,
                "seconds_per_step": plan.value("seconds_per_step"),
                "total_bytes_per_device": plan.value("bytes_per_device.total"),
            }
    return None


def nearby(setting: StepSetting) -> Iterator[tuple[str, StepSetting]]:
    """Yield (description of the changes, setting) for nearby settings.

    The changes come in this order: remat, accumulate, more devices on the model axis and then on the context axis,
    shorter rows, more hardware. remat and accumulate stay changed; the other changes are tried one at a time. The
    number of rows per step never changes.
    """
    changes: dict[str, str] = {}

    def described(**more: str) -> str:
        return ", ".join(f"{name}={value}" for name, value in (changes | more).items())

    current = setting
    if current.step.remat != "full":
        current, changes["remat"] = current.with_step(remat="full"), "full"
        yield described(), current
    while current.step.batch_size % (current.mesh_sizes.data * current.step.accumulate * 2) == 0:
        current = current.with_step(accumulate=current.step.accumulate * 2)
        changes["accumulate"] = str(current.step.accumulate)
        yield described(), current
    for other in _on_meshes(current, current.hardware, _regrouped(current)):
        yield described(mesh=other.described["mesh"], accumulate=str(other.step.accumulate)), other
    shorter = current
    while shorter.step.length > MIN_LENGTH:
        shorter = shorter.with_step(length=max(MIN_LENGTH, shorter.step.length // 2))
        yield described(length=str(shorter.step.length)), shorter
    hardware = current.hardware
    while (hardware := larger(hardware)) is not None:
        factor = hardware.count // current.hardware.count
        for other in _on_meshes(current, hardware, _enlarged(current, factor)):
            mesh, accumulate = other.described["mesh"], str(other.step.accumulate)
            yield described(hardware=hardware.name, mesh=mesh, accumulate=accumulate), other


def _on_meshes(setting: StepSetting, hardware: Hardware, meshes: Iterator[tuple[int, ...]]) -> Iterator[StepSetting]:
    """Yield the setting on each mesh that its rows and the model's heads can be split over, one row at a time."""
    for mesh in meshes:
        if setting.step.batch_size % mesh[0] == 0 and mesh[1] <= setting.model.num_q_heads:
            moved = dataclasses.replace(setting, hardware=hardware, mesh=mesh)
            yield moved.with_step(accumulate=setting.step.batch_size // mesh[0])


def _regrouped(setting: StepSetting) -> Iterator[tuple[int, ...]]:
    """Yield meshes of the same number of devices that split heads, or the length of rows, instead of the batch."""
    data, model, *context = setting.mesh
    halvings = [2**i for i in range(1, data.bit_length()) if data % 2**i == 0]
    yield from ((data // n, model * n, *context) for n in halvings)
    if ROWS_CAN_BE_SPLIT:
        yield from ((data // n, model, setting.mesh_sizes.context * n) for n in halvings)


def _enlarged(setting: StepSetting, factor: int) -> Iterator[tuple[int, ...]]:
    """Yield meshes with `factor` times the number of devices."""
    data, model, *context = setting.mesh
    yield data * factor, model, *context
    yield data, model * factor, *context
    if ROWS_CAN_BE_SPLIT:
        yield data, model, setting.mesh_sizes.context * factor
