"""What a compiled program computes and sends between devices, read from its HLO."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

_BYTES = {"pred": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_COLLECTIVES = {"all-gather", "all-reduce", "all-to-all", "collective-permute"}
_COLLECTIVES |= {"ragged-all-to-all", "reduce-scatter"}


class Collective(NamedTuple):
    op: str
    bytes: int  # of its result on one device
    times: int  # how often it runs: more than once inside a loop


class _Instruction(NamedTuple):
    op: str
    result: str  # its shapes, as text
    line: str
    times: int
    shapes: dict[str, str]  # of the other instructions of its computation, by name


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """Every collective that one run executes, with those of both branches of a cond."""
    return [
        Collective(i.op, sum(_size(*s) for s in _shapes(i.result)), i.times)
        for i in _executed(compiled)
        if i.op in _COLLECTIVES
    ]


def bytes_of(found: list[Collective]) -> dict[str, int]:
    """Bytes that one run moves, by kind of collective."""
    total: dict[str, int] = {}
    for c in found:
        total[c.op] = total.get(c.op, 0) + c.bytes * c.times
    return total


def matrix_flops(compiled: jax.stages.Compiled) -> float:
    """Operations of the matrix products that one run executes on one device."""
    total = 0.0
    for i in _executed(compiled):
        if i.op == "dot":
            [(_, result)] = _shapes(i.result)
            operand = re.search(r" dot\((?:[^,%]* )?%?([\w.\-]+)[,)]", i.line)
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.line)
            assert operand is not None
            assert contracted is not None
            [(_, lhs)] = _shapes(i.shapes[operand[1]])
            sizes = [_dims(lhs)[d] for d in _dims(contracted[1])]
            total += 2.0 * i.times * math.prod(_dims(result)) * math.prod(sizes)
    return total


def _executed(compiled: jax.stages.Compiled) -> Iterator[_Instruction]:
    """Every instruction that one run executes, with those of both branches of a cond."""
    computations, name, entry = {}, None, None
    for line in (compiled.as_text() or "").splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name:
            computations[name].append(line)

    def of_computation(name, times):
        found = [
            (re.search(r"%?([\w.\-]+) = (.*?) ([\w\-]+)\(", line), line)
            for line in computations[name]
        ]
        shapes = {match[1]: match[2] for match, _ in found if match}
        for match, line in found:
            if not match:
                continue
            op = match[3].removesuffix("-start")
            yield _Instruction(op, match[2], line, times, shapes)
            inside = times
            if op == "while":
                # If the number is unknown, one: the loop of `hold_unclipped` over all
                # entries, which usually runs no round.
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                inside *= int(trips[1]) if trips else 1
            called = re.findall(
                r"(?:\w*body|\w*condition|\w*calls|to_apply|\w+_computation)=%?([\w.\-]+)",
                line,
            )
            called += re.findall(
                r"[\w.\-]+", "".join(re.findall(r"branch_computations=\{(.*?)\}", line))
            )
            for other in called:
                yield from of_computation(other, inside)

    return of_computation(entry, 1)


def _shapes(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(\w+)\[([\d,]*)\]", text)


def _dims(text: str) -> list[int]:
    return [int(d) for d in text.split(",") if d]


def _size(dtype: str, dims: str) -> int:
    return _BYTES[dtype] * math.prod(_dims(dims))
