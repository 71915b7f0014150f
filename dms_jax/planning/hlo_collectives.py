"""Find the collectives of a compiled program in its text, `jax.stages.Compiled.as_text()`.

The text is XLA's HLO after partitioning, so all shapes are those of one device. A collective in a loop counts once per
iteration, and every branch of a conditional counts. Begin with `collectives`.
"""

import itertools
import math
import re
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"\b(body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(?:-start)?")


class Collective(NamedTuple):
    """One collective instruction of a program."""

    kind: str  # one of KINDS
    bytes: int  # size of the operands on one device, per execution
    executions: int  # product of the trip counts of the enclosing loops; an unknown trip count is taken as 1
    group_size: int  # number of devices that exchange data; 2 for a permutation, where each device sends to one other
    name: str
    loops: int  # number of enclosing loops
    shapes: tuple[tuple[int, ...], ...]  # shapes of the results on one device

    @property
    def sent(self) -> float:
        """Bytes that each device sends per execution with the ring algorithm, which sends the fewest bytes."""
        n = self.group_size
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1, "collective-broadcast": 1}
        return self.bytes * share.get(self.kind, (n - 1) / n)


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


def collectives(compiled_text: str) -> list[Collective]:
    """List the collectives of a compiled program in execution order. Raises ValueError if the text is not HLO."""
    computations, entry = _parse(compiled_text)
    if entry is None:
        raise ValueError("the text must be that of a compiled program, but it has no ENTRY computation")
    partitions = re.search(r"num_partitions=(\d+)", compiled_text)
    num_partitions = int(partitions[1]) if partitions else 1
    found: list[Collective] = []

    def visit(name: str, executions: int, loops: int, chains: set[str]) -> None:
        shape_of = {i.name: i.shape for i in computations[name]}
        for i in computations[name]:
            if match := _COLLECTIVE.fullmatch(i.opcode):
                kind = match[1]
                # The TPU compiler writes a reduce-scatter as an all-reduce in a computation of this name.
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                # A TPU overlaps a collective with several fusions, and each fusion repeats it with the same channel id.
                chain = re.search(r"channel_id=(\d+).*chain_id=", i.rest)
                if chain is None or chain[1] not in chains:
                    found.append(_collective(i, kind, shape_of, executions, loops, num_partitions))
                if chain is not None:
                    chains.add(chain[1])
            inner = _called(i)
            if i.opcode == "while":
                count = _trip_count(i, computations)
                visit(inner[0], executions * count, loops + 1, set())
            elif i.opcode not in ("reduce", "all-reduce", "reduce-scatter"):  # these call a scalar function
                for callee in inner:
                    visit(callee, executions, loops, chains)

    visit(entry, 1, 0, set())
    return found


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            if (match := _COMPUTATION.match(line)) is not None:
                current = computations.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif (match := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))) is not None:
            current.append(_Instruction(*match.groups()))
    return computations, entry


def _called(i: _Instruction) -> list[str]:
    names = [
        name
        for _, single, several in _CALLED.findall(i.rest)
        for name in ([single] if single else re.findall(r"[\w.\-]+", several))
    ]
    return names if i.opcode != "while" else re.findall(r"\bbody=%?([\w.\-]+)", i.rest)


def _trip_count(i: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    if (known := re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest)) is not None:
        return int(known[1])
    # HLO for TPUs has no trip counts, but the loops of `lax.scan` count from 0 up to a constant in their condition.
    condition = computations[re.findall(r"\bcondition=%?([\w.\-]+)", i.rest)[0]]
    constants = {
        c.name: int(c.rest.split(")")[0]) for c in condition if c.opcode == "constant" and re.match(r"\d+\)", c.rest)
    }
    compare = next((c for c in condition if c.opcode == "compare" and "direction=LT" in c.rest), None)
    limits = [constants[name] for name in _operands(compare.rest) if name in constants] if compare is not None else []
    return limits[0] if limits else 1


def _operands(rest: str) -> list[str]:
    """Return the names of the operands, which end at the closing parenthesis of the call.

    Tilings in shapes nest parentheses.
    """
    depth = itertools.accumulate(({"(": 1, ")": -1}.get(letter, 0) for letter in rest), initial=1)
    inside = rest[: next((end for end, open_ in enumerate(depth) if not open_), len(rest)) - 1]
    return re.findall(r"%([\w.\-]+)", inside) or re.findall(r"[\w.\-]+", inside)


def _collective(
    i: _Instruction, kind: str, shape_of: dict[str, str], executions: int, loops: int, num_partitions: int
) -> Collective:
    operands = _operands(i.rest)
    size = sum(_bytes(shape_of.get(name, "")) for name in operands)
    # The result of a `-start` instruction is (operands, results, ...), so the operands are skipped.
    arrays = [tuple(int(d) for d in re.findall(r"\d+", dims)) for _, dims in _ARRAY.findall(i.shape)]
    started = i.opcode.endswith("-start") and (kind != "all-reduce" or len(arrays) > len(operands))
    shapes = arrays[len(operands) : 2 * len(operands)] if started else arrays
    return Collective(kind, size, executions, _group_size(i.rest, kind, num_partitions), i.name, loops, tuple(shapes))


def _bytes(shape: str) -> int:
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        bits = BITS.get(dtype) or (8 if dtype.startswith("f8") else int((re.findall(r"\d+", dtype) or [0])[0]))
        total += math.prod(int(d) for d in re.findall(r"\d+", dims)) * bits
    return total // 8


def _group_size(rest: str, kind: str, num_partitions: int) -> int:
    if kind == "collective-permute":
        return 2
    if (listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest)) is not None:
        return listed[1].count(",") + 1
    if (iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest)) is not None:
        return int(iota[1])
    if (named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:<=\S+)? *\{([^}]*)\}", rest)) is not None:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])  # part of an axis: 'x':(1)2
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    return num_partitions
