"""Options that are one short text: meshes, names of hardware, names of policies."""

import dataclasses
import json
import random
import re
from pathlib import Path

from cases import TINY
from fuzz.fuzz_case import Target

from dms_jax.config import DMSConfig
from dms_jax.planning.hardware import hardware_of
from dms_jax.policies import describe, policy_of
from dms_jax.sharding import parse_mesh


def text_target(name: str, count: int, good: list[str], read, means, names: str) -> Target:
    """The target for an option whose values are like those in `good`."""

    def mutate(rng: random.Random, folder: Path) -> str:
        text = rng.choice(good)
        for _ in range(rng.choice([1, 1, 2, 3])):
            at = rng.randrange(len(text) + 1)
            piece = rng.choice(
                ["x", "-", "0", "9" * 4400, "1", ":", " ", "", "\0", "٣", "é", "-1", ".", "X", "²", rng.choice(good)]
            )
            text = text[:at] + piece + text[at + rng.choice([0, 0, 1, 3]) :]
        (folder / "option.json").write_text(json.dumps(text))
        return f"{text[:50]!r}"

    def on_the_text(function):
        return lambda folder: function(json.loads((folder / "option.json").read_text()))

    def make(folder: Path) -> None:
        (folder / "option.json").write_text(json.dumps(good[0]))

    return Target(name, count, make, mutate, on_the_text(read), on_the_text(means), names)


def meant_mesh(text: str) -> tuple[int, ...]:
    parts = tuple(int(part) for part in text.lower().split("x"))
    assert min(parts) >= 1
    return parts


def meant_hardware(text: str) -> tuple[str, int]:
    """The kind of device, and the product of all numbers after it."""
    match = re.fullmatch(r"(h100|h200|cpu|v5e|v6e|v5p)(?:(?:x|-)([0-9]+(?:x[0-9]+)*))?", text.strip().lower())
    assert match
    count = 1
    for part in (match[2] or "1").split("x"):
        count *= int(part)
    return match[1], count


def read_policy(text: str) -> dict:
    return describe(policy_of(dataclasses.replace(TINY, dms=DMSConfig()), text))


def meant_policy(text: str) -> dict:
    if text.startswith("prompt:"):
        return {"name": "prompt", "method": meant_policy(text.removeprefix("prompt:"))}
    name, _, budget = text.partition(":")
    return (
        (describe(policy_of(dataclasses.replace(TINY, dms=DMSConfig()), f"{name}:{int(budget)}")) | {"name": name})
        if budget
        else {"name": name}
    )


TARGETS = [
    text_target("mesh", 80, ["8x1", "1x1", "4x2"], parse_mesh, meant_mesh, "mesh"),
    text_target(
        "hardware name",
        120,
        ["h100x8", "v5e-8", "v5p-2x2x2", "cpu", "cpux8", "h200x1"],
        lambda text: tuple(hardware_of(text)[1:]),
        meant_hardware,
        "ardware",
    ),
    text_target(
        "policy name",
        120,
        ["tova:256", "dms", "prompt:snapkv:64", "dense", "quest:8"],
        read_policy,
        meant_policy,
        "policy",
    ),
]
