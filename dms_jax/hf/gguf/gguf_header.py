"""The metadata and the tensor list of a GGUF file. Every length is checked against the size of the file before use.

`gguf.GGUFReader` trusts the lengths in a file: an array that claims 2**60 entries makes it grow until memory runs out,
and two tensors may share their bytes. Format: ggml's `gguf.md`. Beyond it, files that llama.cpp's own reader refuses
are refused.
"""

import math
import mmap
import struct
from typing import Any, NamedTuple

import numpy as np

from dms_jax.errors import ConfigError, shown
from dms_jax.files import check_file

# GGUF type -> struct code
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4  # ggml's limit
# Far above any real file: vocabularies have at most some 300,000 tokens, and a header with one has about 10 MB. A
# sparse file can claim gigabytes that cost nothing on disk.
MAX_ENTRIES, MAX_HEADER = 2**24, 2**28  # of all arrays together, and in bytes


class GGUFTensor(NamedTuple):
    """One tensor of the file, still in its quantization."""

    shape: tuple[int, ...]  # in NumPy's order; ggml lists the fastest axis first
    kind: Any  # gguf.GGMLQuantizationType
    data: np.ndarray  # memory-mapped; a quantized tensor as uint8, whose last axis counts bytes

    @property
    def bits(self) -> float:
        """Stored bits per element."""
        return 8 * self.data.nbytes / math.prod(self.shape)


def read_gguf(path: str) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Return the metadata and the tensors of a file, both by their names in the file. Raises ConfigError."""
    check_file(path)
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
    """A parser of the header from byte `at` on. It raises ValueError if the file ends early or contradicts itself."""

    def __init__(self, view: mmap.mmap):
        self.view, self.at, self.entries = view, 0, 0

    def read(self) -> tuple[dict[str, Any], list[_Info], int]:
        """Return the metadata, the tensor list, and the position of the first byte after them."""
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with the letters GGUF")
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported; supported: 2 and 3, little-endian")
        num_tensors, num_fields = self._entries(24), self._entries(13)
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._text()
            if key in fields:
                raise ValueError(f"duplicate key {shown(key)}")
            fields[key] = self._value(self._scalar("I"))
        return fields, [self._info() for _ in range(num_tensors)], self.at

    def _info(self) -> _Info:
        name, number = self._text(), self._scalar("I")
        if not 1 <= number <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {shown(name)} must have 1 to {MAX_DIMENSIONS} dimensions, got {number}")
        return _Info(name, [self._scalar("Q") for _ in range(number)], self._scalar("I"), self._scalar("Q"))

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            inner = self._scalar("I")
            if inner == STRING:
                return [self._text() for _ in range(self._entries(8))]
            code = self._code(inner)
            count = self._entries(struct.calcsize(code))
            return np.frombuffer(self._bytes(count * struct.calcsize(code)), np.dtype(f"<{code}")).tolist()
        return self._scalar(self._code(kind))

    def _code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise ValueError(f"unknown value type {kind} at byte {self.at}")
        return SCALARS[kind]

    def _count(self, min_bytes: int) -> int:
        """Read the number of entries that follow, each of which takes at least `min_bytes` bytes."""
        count = self._scalar("Q")
        if count * min_bytes > len(self.view) - self.at:
            raise ValueError(f"{count} entries at byte {self.at} do not fit into a file of {len(self.view)} bytes")
        return count

    def _entries(self, min_bytes: int) -> int:
        """Read the number of entries of a list, which with all lists before it must stay within `MAX_ENTRIES`."""
        self.entries += (count := self._count(min_bytes))
        if self.entries > MAX_ENTRIES:
            raise ValueError(f"its header has lists of more than {MAX_ENTRIES} entries, at byte {self.at}")
        return count

    def _text(self) -> str:
        return self._bytes(self._count(1)).decode()

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(code)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > len(self.view) - self.at:
            raise ValueError(f"the file ends at byte {len(self.view)}, within its header")
        if self.at + count > MAX_HEADER:
            raise ValueError(f"its header has more than {MAX_HEADER} bytes")
        self.at += count
        return self.view[self.at - count : self.at]


def _tensors(path: str, infos: list[_Info], start: int, alignment: object) -> dict[str, GGUFTensor]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, got {shown(alignment)}")
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
            raise ValueError(f"tensor {shown(name)} cannot have dimensions {dimensions} in type {kind.name}")
        nbytes = math.prod(dimensions) // block * size
        begin = start + offset
        if name in tensors or offset != expected or begin + nbytes > len(whole):
            problem = "does not begin where the one before it ends" if offset != expected else "is cut off"
            problem = "is a duplicate" if name in tensors else problem
            raise ValueError(f"tensor {shown(name)} {problem} (the file has {len(whole)} bytes)")
        expected += nbytes + -nbytes % alignment
        shape, data = tuple(reversed(dimensions)), whole[begin : begin + nbytes]
        rows = (
            data.view(plain[kind]).reshape(shape)
            if kind in plain
            else data.reshape(quant_shape_to_byte_shape(shape, kind))
        )
        tensors[name] = GGUFTensor(shape, kind, rows)
    if start + expected < len(whole):  # bytes were inserted, so each tensor would be read from the wrong place
        raise ValueError(f"{len(whole) - start - expected} bytes follow its last tensor")
    return tensors
