"""Seeded damage to bytes, JSON values, text and files. Each function draws from `rng` and describes what it did."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGE = 2**60
ODD_TEXTS = [
    "",
    " ",
    "\0",
    "../x",
    "/etc/hostname",
    "a" * 5000,
    "\ud800",
    "\u202e𝔘🙂",
    "nan",
    "1e999",
    "true",
    "-1",
    "null",
    "%s{}",
    "x\ny",
]
ODD_NUMBERS: list[Any] = [
    0,
    -1,
    1,
    2,
    3,
    7,
    2**31,
    2**63,
    HUGE,
    10**400,
    -HUGE,
    0.5,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    1.0,
]


def odd_value(rng: random.Random) -> Any:
    """A JSON value that no reader expects."""
    return rng.choice(
        [
            lambda: rng.choice(ODD_NUMBERS),
            lambda: rng.choice(ODD_TEXTS),
            lambda: rng.choice([True, False]),
            lambda: None,
            lambda: [],
            lambda: {},
            lambda: [rng.choice(ODD_NUMBERS)],
            lambda: {"x": rng.choice(ODD_TEXTS)},
            lambda: [[]],
            lambda: nested(rng.choice([3, 200])),
        ]
    )()


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def change_value(rng: random.Random, root: Any) -> str:
    """Change one value of a JSON tree in place: delete, rename, retype, swap or scale it.

    An empty root stays as it is.
    """
    places = _places(root)
    if not places:
        return "nothing"
    where, key = rng.choice(places)
    old, action = where[key], rng.randrange(9)
    if action == 0:
        del where[key]
        return f"delete {key!r}"
    if action == 1 and isinstance(where, dict):
        new = rng.choice([f"{key}x", key[:-1], key.upper(), "", key + "\0", rng.choice(list(where))])
        where[new] = where.pop(key)
        return f"rename {key!r} to {new!r}"
    if action == 2:
        other, there = rng.choice(places)
        where[key], other[there] = other[there], old
        return f"swap {key!r} and {there!r}"
    if action in (3, 4) and isinstance(old, (int, float)) and not isinstance(old, bool):
        where[key] = rng.choice(
            [old + 1, old - 1, old * 2, -old, float(old) + 0.5, str(old), [old], HUGE, math.nan, math.inf]
        )
        return f"{key!r}: {old} -> {str(where[key])[:40]}"
    if action == 5 and isinstance(where, dict):
        where[rng.choice(["unknown", "x.y", "\ud800", "__class__"])] = odd_value(rng)
        return "add a key"
    if action == 6 and isinstance(old, str):
        where[key] = rng.choice(
            [old[:-1], old + "x", old.upper(), f"../{old}", old + "\0", "\u00e9" + old, old * 500, [old]]
        )
        return f"text of {key!r}"
    where[key] = odd_value(rng)
    return f"{key!r} becomes {str(where[key])[:40]!r}"


def _places(value: Any) -> list[tuple[Any, Any]]:
    """The container and the key of every value in a tree."""
    if not isinstance(value, (dict, list)):
        return []
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    return [(value, key) for key, _ in items] + [place for _, item in items for place in _places(item)]


def change_json(rng: random.Random, text: bytes) -> tuple[bytes, str]:
    """Change a JSON object as a value or as text: duplicate keys, deep nesting, comments, commas, damaged bytes."""
    kind = rng.randrange(10)
    if kind < 6:
        value = json.loads(text)
        how = ", ".join(change_value(rng, value) for _ in range(rng.choice([1, 1, 1, 2])))
        return json.dumps(value).encode(), how
    stripped = text.strip()
    if kind == 6 and stripped.startswith(b"{") and (names := list(json.loads(text))):
        name = rng.choice(names)
        return b"{%s: %s, %s" % (
            json.dumps(name).encode(),
            json.dumps(odd_value(rng)).encode(),
            stripped[1:],
        ), f"duplicate {name!r}"
    if kind == 7:
        return rng.choice(
            [
                b"[" * 100_000,
                b'{"a":' * 100_000,
                b"",
                b"null",
                b"[]",
                b'"x"',
                b"{}",
                b"1" * 10_000,
                b"// c\n" + text,
                text + b",",
            ]
        ), "other JSON"
    return damage(rng, text)


def damage(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Flip, cut, insert, repeat, remove, zero, swap or recode some bytes."""
    if not data:
        return b"\xff\x00", "bytes into an empty file"
    at, size = rng.randrange(len(data)), 1 + rng.randrange(min(64, len(data)))
    end = min(len(data), at + size)
    bit = bytes([data[at] ^ 1 << rng.randrange(8)])
    other = rng.randrange(len(data))
    choices: list[tuple[str, Callable[[], bytes]]] = [
        ("flip a bit", lambda: data[:at] + bit + data[at + 1 :]),
        ("flip a bit", lambda: data[:at] + bit + data[at + 1 :]),
        ("random bytes", lambda: data[:at] + rng.randbytes(end - at) + data[end:]),
        ("cut off", lambda: data[:at]),
        ("cut off by little", lambda: data[: -min(len(data), 1 + rng.randrange(8))]),
        ("insert", lambda: data[:at] + rng.randbytes(size) + data[at:]),
        ("repeat", lambda: data[:end] + data[at:]),
        ("remove", lambda: data[:at] + data[end:]),
        ("zeros", lambda: data[:at] + bytes(end - at) + data[end:]),
        ("swap", lambda: data[: min(at, other)] + data[max(at, other) :] + data[min(at, other) : max(at, other)]),
        ("garbage after", lambda: data + rng.randbytes(size)),
        ("NUL", lambda: data[:at] + b"\0" + data[at:]),
        ("invalid UTF-8", lambda: data[:at] + b"\xff\xfe" + data[at:]),
        ("byte order mark", lambda: b"\xef\xbb\xbf" + data),
        ("UTF-16", lambda: data.decode("latin-1").encode("utf-16")),
        ("half a surrogate", lambda: data[:at] + b"\\ud800" + data[at:]),
    ]
    name, make = rng.choice(choices)
    return make(), f"{name} at {at} of {len(data)}"


def damage_head(rng: random.Random, data: bytes, head: int) -> tuple[bytes, str]:
    """Damage bytes, mostly the first `head` ones, and sometimes overwrite a length field with a number like 2**60."""
    if rng.random() < 0.2:
        at = rng.randrange(0, max(1, min(head, len(data) - 8)))
        value = rng.choice([HUGE, 2**63 - 1, 2**64 - 1, 2**32, len(data) + 1, 0])
        return data[:at] + value.to_bytes(8, "little") + data[at + 8 :], f"{value} as 8 bytes at {at}"
    if rng.random() < 0.9:
        start, how = damage(rng, data[:head])
        return start + data[head:], f"in the header: {how}"
    return damage(rng, data)


def replace_file(rng: random.Random, path: Path) -> str:
    """Remove a file, empty it, or replace it by a folder or a link. A link to a copy is harmless."""
    kind = rng.choice(
        ["gone", "empty", "a folder", "a link to nothing", "a link to itself", "a link to a copy", "a full folder"]
    )
    copy = path.with_name(f".copy-of-{path.name}")
    if kind == "a link to a copy":
        shutil.copyfile(path, copy)
    path.unlink()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "a link to nothing":
        path.symlink_to("nothing")
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a link to a copy":
        path.symlink_to(copy.name)
    elif "folder" in kind:
        path.mkdir()
        if "full" in kind:
            (path / "file").write_text("x")
    return f"{path.name} is {kind}"


def rewrite(path: Path, change: Callable[[bytes], tuple[bytes, str]]) -> str:
    """Replace the content of a file by `change` of it."""
    new, how = change(path.read_bytes())
    path.write_bytes(new)
    return f"{path.name}: {how}"
