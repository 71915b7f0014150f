"""Training data and prompts (text, JSON lines, token ids, tables), and the checkpoints of a run."""

import ast
import gzip
import json
import random
import re
import shutil
import tempfile
import unittest.mock
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fuzz import oracles
from fuzz.chat_targets import CHAT, meant_message
from fuzz.fuzz_case import Target
from fuzz.mutations import damage, replace_file, rewrite
from fuzz.own_targets import mutate_lines

from dms_jax.checkpoint import COMMIT_MARKER, Checkpoints
from dms_jax.engine.prompts import read_prompts
from dms_jax.training.data.documents import Keys, expand_paths, read_documents

KEYS = Keys("text", "messages")
JSONL, ZIPPED, TXT, NPY, TABLE, PROMPTS = (
    "data.jsonl",
    "data.jsonl.gz",
    "data.txt",
    "ids.npy",
    "table.parquet",
    "prompts.jsonl",
)
RECORDS = [
    {"text": "a first text\nof two lines"},
    {"text": "été 🙂"},
    {"messages": CHAT},
    {"text": "", "other": [1, {"a": None}]},
    {"text": "x" * 300},
]
ODD_RECORDS = [
    '{"text": 3}',
    '{"text": null}',
    '{"messages": "x"}',
    '{"messages": [{"role": 1}]}',
    '{"text": "a\\u0000b"}',
    '{"text": "\\ud800"}',
    '["text"]',
    '{"txt": "x"}',
]
ODD_PROMPTS = ['{"prompt": 3}', '{"prompt": ""}', '{"messages": []}', '{"prompt": "a", "messages": []}']


def read(name: str):
    def read_in(folder: Path) -> Any:
        (path,) = expand_paths((str(folder / name),))
        return [
            document.tolist() if isinstance(document, np.ndarray) else document
            for _, document in read_documents(path, KEYS)
        ]

    return read_in


def lines_of(path: Path) -> list[Any]:
    return [
        oracles.strict_json(line.decode().removeprefix("\ufeff").encode())
        for line in path.read_bytes().split(b"\n")
        if line.strip()
    ]


def meant_jsonl(folder: Path) -> Any:
    found = []
    for record in lines_of(folder / JSONL):
        value = (
            record["text"] if (record.get("text") or "").strip() or not record.get("messages") else record["messages"]
        )
        texts = [value] if isinstance(value, str) else [message["content"] for message in value]
        assert all(isinstance(text, str) and "\0" not in text for text in texts)
        json.dumps(record, ensure_ascii=False).encode()  # fails for lone surrogates
        found.append(value)
    return found


def make_jsonl(folder: Path) -> None:
    (folder / JSONL).write_text("".join(json.dumps(record) + "\n" for record in RECORDS))


def make_zipped(folder: Path) -> None:
    (folder / ZIPPED).write_bytes(
        gzip.compress("".join(json.dumps(record) + "\n" for record in RECORDS).encode(), mtime=0)
    )


def meant_zipped(folder: Path) -> Any:
    """gzip reads an empty file as an empty stream. A later stage refuses data without documents."""
    assert (folder / ZIPPED).read_bytes() == b""
    return []


def make_txt(folder: Path) -> None:
    (folder / TXT).write_text("First text.\nSecond line.\n\n\n\nÉté.\r\n\r\n\r\n\r\nThird 🙂\n\nstill third\n")


def meant_txt(folder: Path) -> Any:
    """Documents are separated by lines of `<|endoftext|>`, or, in a file without them, by two or more blank lines."""
    text = (folder / TXT).read_bytes().decode().removeprefix("\ufeff")
    assert "\0" not in text
    lines, parts, blank = text.replace("\r\n", "\n").split("\n"), [[]], 0
    by_mark = any(re.fullmatch(r"<\|endoftext\|>[ \t]*", line) for line in lines)
    for number, line in enumerate(lines):
        if by_mark:
            parts.append([]) if re.fullmatch(r"<\|endoftext\|>[ \t]*", line) else parts[-1].append(line)
            continue
        blank = blank + 1 if not line.strip(" \t") and 0 < number < len(lines) - 1 else 0
        if blank:
            continue
        run = 0
        while number - 1 - run > 0 and not lines[number - 1 - run].strip(" \t"):
            run += 1
        if run >= 2:
            parts.append([line])
        else:
            parts[-1] += [*lines[number - run : number], line]
    found = ["\n".join(part).strip("\n") for part in parts]
    return found[:-1] if len(found) > 1 and not found[-1].strip() else found


def make_npy(folder: Path) -> None:
    np.save(folder / NPY, np.arange(120, dtype=np.int32).reshape(4, 30) % 97)


def meant_npy(folder: Path) -> Any:
    data = (folder / NPY).read_bytes()
    assert data[:6] == b"\x93NUMPY"
    wide = data[6] > 1
    size = int.from_bytes(data[8 : 12 if wide else 10], "little")
    start = (12 if wide else 10) + size
    header = ast.literal_eval(data[start - size : start].decode("latin-1"))
    ids = np.frombuffer(data[start:], np.dtype(header["descr"])).reshape(
        header["shape"], order="F" if header["fortran_order"] else "C"
    )
    assert ids.dtype.kind in "iu"
    return [row.tolist() for row in (ids if ids.ndim == 2 else ids[None])]


def mutate_npy(rng: random.Random, folder: Path) -> str:
    path, kind = folder / NPY, rng.randrange(8)
    if kind == 0:
        return replace_file(rng, path)
    if kind == 1:
        other = rng.choice(
            [
                np.zeros((2, 3)),
                np.zeros((2, 2, 2), np.int32),
                np.array(["a"]),
                np.zeros(3, bool),
                np.int32(3),
                np.array([{}], object),
            ]
        )
        np.save(path, other, allow_pickle=True)
        return f"{other.dtype} of shape {other.shape}"
    if kind < 4:
        return rewrite(path, lambda data: damage_part(rng, data, 128))
    return rewrite(path, lambda data: damage(rng, data))


def damage_part(rng: random.Random, data: bytes, head: int) -> tuple[bytes, str]:
    start, how = damage(rng, data[:head])
    return start + data[head:], how


@cache
def has_tables() -> bool:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


def make_table(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", "two", None, "four"]}), folder / TABLE)


def mutate_table(rng: random.Random, folder: Path) -> str:
    """Cut, misframe or replace the file.

    A flipped bit in a page is not detectable, because the file has no checksums.
    """
    path = folder / TABLE
    if rng.random() < 0.2:
        return replace_file(rng, path)
    data = path.read_bytes()
    at = rng.randrange(len(data))
    how, new = rng.choice(
        [
            ("cut", data[:at]),
            ("end", data[:-8] + rng.randbytes(8)),
            ("start", rng.randbytes(8) + data[at:]),
            ("none", rng.randbytes(at)),
            ("text", b"PAR1" + b"x" * at + b"PAR1"),
            ("long footer", data[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1"),
        ]
    )
    path.write_bytes(new)
    return f"{how} at {at}"


def make_prompts(folder: Path) -> None:
    lines = [{"prompt": "one and one?"}, {"messages": CHAT[:1]}, {"prompt": "été", "id": 7}]
    (folder / PROMPTS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_prompt_file(folder: Path) -> Any:
    return [prompt.content for prompt in read_prompts(str(folder / PROMPTS))]


def meant_prompts(folder: Path) -> Any:
    found = []
    for line in (folder / PROMPTS).read_bytes().split(b"\n"):
        text = line.decode().removeprefix("\ufeff")
        if text.strip():
            record = oracles.strict_json(text.encode())
            json.dumps(record, ensure_ascii=False).encode()
            (key,) = [key for key in ("prompt", "messages", "conversations") if record.get(key) is not None]
            content = record[key]
            assert content
            found.append(content if isinstance(content, str) else [meant_message(message) for message in content])
    return found


# --- checkpoints ---


@cache
def state(step: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    return {"step": jnp.int32(step), "weights": jnp.asarray(rng.normal(size=(8, 12)), jnp.float32)}


def make_checkpoints(folder: Path) -> None:
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state(step), {"run": "this"}, wait=True)
    checkpoints.close()


def mutate_checkpoints(rng: random.Random, folder: Path) -> str:
    where = folder / "checkpoints"
    step = where / rng.choice(["2", "2", "2", "1"])
    files = sorted(path for path in step.rglob("*") if path.is_file())
    kind = rng.randrange(10)
    if kind == 0:
        shutil.rmtree(step)
        return f"{step.name} is removed"
    if kind == 1:
        step.rename(where / rng.choice(["3", "007", "step_2", "2.tmp", "99"]))
        return f"{step.name} is renamed"
    if kind == 2:
        shutil.rmtree(step)
        step.write_text("a note")
        return f"{step.name} is a file"
    if kind == 3:
        (where / "5").mkdir()
        (where / "5" / rng.choice([COMMIT_MARKER, "weights.bin"])).write_bytes(rng.randbytes(9))
        return "a foreign 5"
    path = rng.choice(files)
    if kind == 4:
        return replace_file(rng, path)
    if kind == 5:
        other = rng.choice(files)
        path.write_bytes(other.read_bytes())
        return f"{path.name} becomes {other.name}"
    return rewrite(path, lambda data: damage(rng, data))


def read_checkpoints(folder: Path) -> Any:
    """Restore from a copy, because unusable folders are moved aside. "whole": the numbers saved as that step."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(1))
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, "checkpoints")
        shutil.copytree(folder / "checkpoints", copy, symlinks=True)
        with unittest.mock.patch("dms_jax.checkpoint.SETTLED", 0.0):  # nobody else writes here
            found = Checkpoints(copy).restore_latest(like, lambda metadata: None)
    if found is None:
        return "none"
    saved = int(found.state["step"])
    same = (
        jax.tree.map(lambda a, b: bool((a == b).all()), found.state, state(saved))
        if saved in (1, 2)
        else {"step": False}
    )
    return "whole" if all(same.values()) else f"step {found.step}: {same}"


def meant_checkpoints(folder: Path) -> Any:
    assert not [
        path for path in (folder / "checkpoints").iterdir() if path.name.isdigit() and (path / COMMIT_MARKER).exists()
    ]
    return "none"


def mutate_text(name: str):
    def mutate(rng: random.Random, folder: Path) -> str:
        return (
            replace_file(rng, folder / name)
            if rng.random() < 0.1
            else rewrite(folder / name, lambda data: damage(rng, data))
        )

    return mutate


TARGETS = [
    Target("JSON lines", 200, make_jsonl, mutate_lines(JSONL, ODD_RECORDS), read(JSONL), meant_jsonl),
    Target("JSON lines, gzip", 80, make_zipped, mutate_text(ZIPPED), read(ZIPPED), meant_zipped),
    Target("text", 120, make_txt, mutate_text(TXT), read(TXT), meant_txt),
    Target("token ids", 140, make_npy, mutate_npy, read(NPY), meant_npy),
    Target("prompts", 120, make_prompts, mutate_lines(PROMPTS, ODD_PROMPTS), read_prompt_file, meant_prompts),
    Target(
        "checkpoints",
        140,
        make_checkpoints,
        mutate_checkpoints,
        read_checkpoints,
        meant_checkpoints,
        names="checkpoint",
    ),
    *([Target("parquet table", 60, make_table, mutate_table, read(TABLE))] if has_tables() else []),
]
