"""The metadata and the tensor list of a GGUF file, every length checked against the file before anything is read by it.

`gguf.GGUFReader` trusts the lengths: an array that claims 2**60 entries keeps it busy, and growing, for ever; two tensors may share
their bytes. Format: ggml's `gguf.md`; what is refused beyond it is what llama.cpp's own reader refuses.
"""

import math
import mmap
import struct
from typing import Any, NamedTuple

import numpy as np

from dms_jax.errors import ConfigError, shown

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # GGUF type -> struct code
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4  # of ggml


class GGUFTensor(NamedTuple):
    """One tensor as it lies in the file."""

    shape: tuple[int, ...]  # as NumPy counts axes; ggml counts from the fastest
    kind: Any  # gguf.GGMLQuantizationType
    data: np.ndarray  # memory-mapped; a quantised one as bytes, its last axis that many bytes

    @property
    def bits(self) -> float:
        """Per element."""
        return 8 * self.data.nbytes / math.prod(self.shape)


def read_gguf(path: str) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """(metadata, tensors) under the names of the file. Raises ConfigError."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            fields, infos, start = _Parser(view).read()
        return fields, _tensors(path, infos, start, fields.get("general.alignment", 32))
    except (OSError, ValueError, OverflowError) as why:  # UnicodeDecodeError and mmap's "empty file" are ValueErrors
        raise ConfigError(f"{path} is damaged or not a GGUF file: {' '.join(str(why).split())}") from why


class _Info(NamedTuple):
    name: str
    dimensions: list[int]  # fastest first
    kind: int
    offset: int  # from the end of the header


class _Parser:
    """Reads on from `at`; ValueError where the file ends, or says what cannot be."""

    def __init__(self, view: mmap.mmap):
        self.view, self.at = view, 0

    def read(self) -> tuple[dict[str, Any], list[_Info], int]:
        """Metadata, tensor list, and the byte after them."""
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}; supported are 2 and 3, little-endian")
        num_tensors, num_fields = self._count(24), self._count(13)
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._text()
            if key in fields:
                raise ValueError(f"{shown(key)} stands twice")
            fields[key] = self._value(self._scalar("I"))
        return fields, [self._info() for _ in range(num_tensors)], self.at

    def _info(self) -> _Info:
        name, number = self._text(), self._scalar("I")
        if not 1 <= number <= MOST_DIMENSIONS:
            raise ValueError(f"tensor {shown(name)} has {number} dimensions")
        return _Info(name, [self._scalar("Q") for _ in range(number)], self._scalar("I"), self._scalar("Q"))

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            inner = self._scalar("I")
            if inner == STRING:
                return [self._text() for _ in range(self._count(8))]
            code = self._code(inner)
            count = self._count(struct.calcsize(code))
            return np.frombuffer(self._bytes(count * struct.calcsize(code)), np.dtype(f"<{code}")).tolist()
        return self._scalar(self._code(kind))

    def _code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise ValueError(f"a value of type {kind} at byte {self.at}")
        return SCALARS[kind]

    def _count(self, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = self._scalar("Q")
        if count * least > len(self.view) - self.at:
            raise ValueError(f"{count} entries at byte {self.at} of a file of {len(self.view)} bytes")
        return count

    def _text(self) -> str:
        return self._bytes(self._count(1)).decode()

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(code)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > len(self.view) - self.at:
            raise ValueError(f"it ends at byte {len(self.view)}, within its header")
        self.at += count
        return self.view[self.at - count : self.at]


def _tensors(path: str, infos: list[_Info], start: int, alignment: object) -> dict[str, GGUFTensor]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {shown(alignment)}")
    plain = {
        GGMLQuantizationType.F32: np.float32,
        GGMLQuantizationType.F16: np.float16,
        GGMLQuantizationType.F64: np.float64,
    }
    whole = np.memmap(path, np.uint8, "r")
    start += -start % alignment
    tensors, expected = {}, 0
    for name, dimensions, number, offset in infos:
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"tensor {shown(name)} has the unknown type {number}") from None
        block, size = GGML_QUANT_SIZES[kind]
        if min(dimensions) < 1 or dimensions[0] % block:
            raise ValueError(f"tensor {shown(name)} has dimensions {dimensions}, of type {kind.name}")
        nbytes = math.prod(dimensions) // block * size
        begin = start + offset
        if name in tensors or offset != expected or begin + nbytes > len(whole):
            what = (
                "stands twice"
                if name in tensors
                else "is not where the one before it ends"
                if offset != expected
                else "is cut off"
            )
            raise ValueError(f"tensor {shown(name)} {what} ({len(whole)} bytes in all)")
        expected += nbytes + -nbytes % alignment
        shape, data = tuple(reversed(dimensions)), whole[begin : begin + nbytes]
        rows = (
            data.view(plain[kind]).reshape(shape)
            if kind in plain
            else data.reshape(quant_shape_to_byte_shape(shape, kind))
        )
        tensors[name] = GGUFTensor(shape, kind, rows)
    if start + expected < len(whole):  # something was put in, and each tensor would be read from the wrong place
        raise ValueError(f"{len(whole) - start - expected} bytes follow its last tensor")
    return tensors
