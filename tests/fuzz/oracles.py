"""Independent readers of damaged files: strict, small, slow, and without this package or the libraries it uses."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SAFE = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
}
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def strict_json(data: bytes) -> Any:
    """The value of a JSON text without duplicate keys."""

    def without_duplicates(pairs):
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("duplicate key")
        return dict(pairs)

    return json.loads(data.decode(), object_pairs_hook=without_duplicates)


def safetensors(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the tensors of a file in which every byte belongs to exactly one tensor."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = strict_json(data[8 : 8 + size])
    metadata, tensors, at = header.pop("__metadata__", {}), {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        assert begin == at, "a hole"
        tensors[name] = np.frombuffer(data[8 + size + begin : 8 + size + end], SAFE[entry["dtype"]]).reshape(
            entry["shape"]
        )
        at = end
    assert 8 + size + at == len(data), "bytes after the last tensor"
    return metadata, tensors


def gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metadata and the fp32 tensors of a little-endian GGUF file, version 2 or 3, of F32 and F16 tensors."""
    data, at = path.read_bytes(), 0

    def take(code: str):
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def text() -> str:
        nonlocal at
        size = take("Q")
        assert at + size <= len(data)
        at += size
        return data[at - size : at].decode()

    def value(kind: int):
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = take("I"), take("Q")
            assert count <= len(data)
            return [value(inner) for _ in range(count)]
        return take(GGUF_SCALARS[kind])

    assert data[:4] == b"GGUF"
    at = 4
    assert take("I") in (2, 3)
    count, fields = take("Q"), {}
    for _ in range(take("Q")):
        key = text()
        assert key not in fields
        fields[key] = value(take("I"))
    infos = {}
    for _ in range(count):
        name = text()
        assert name not in infos
        infos[name] = ([take("Q") for _ in range(take("I"))][::-1], take("I"), take("Q"))
    alignment = fields.get("general.alignment", 32)
    base = -(-at // alignment) * alignment
    tensors, end = {}, 0
    for name, (shape, kind, offset) in infos.items():
        assert offset >= end, "two tensors on the same bytes"
        end = offset + math.prod(shape) * (4 if kind == 0 else 2)
        dtype = np.dtype({0: np.float32, 1: np.float16}[kind])
        tensors[name] = np.frombuffer(data, dtype, math.prod(shape), base + offset).reshape(shape).astype(np.float32)
    assert len(data) < base + end + alignment, "bytes after the last tensor"
    return fields, tensors


def plain(value: Any) -> Any:
    """A value with its arrays as (dtype, shape, bytes), so that == compares bits."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    if hasattr(value, "dtype"):
        array = np.asarray(value)
        return str(array.dtype), array.shape, array.tobytes()
    return value
