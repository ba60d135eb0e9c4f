"""What a compiled program sends between devices, read from its HLO."""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


class Collective(NamedTuple):
    op: str
    bytes: int  # of its result on one device
    times: int  # how often it runs: more than once inside a loop


def collectives(compiled) -> list[Collective]:
    """Every collective that one run executes, with those of both branches of a cond."""
    computations, name, entry = {}, None, None
    for line in compiled.as_text().splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name:
            computations[name].append(line)

    def of_computation(name, times):
        for line in computations[name]:
            if not (instruction := re.search(r"= (.*?) ([\w\-]+)\(", line)):
                continue
            result, op = instruction[1], instruction[2].removesuffix("-start")
            if op in _COLLECTIVES:
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
                yield Collective(op, sum(_size(*shape) for shape in shapes), times)
            inside = times
            if op == "while":
                inside *= int(re.search(r'known_trip_count":\{"n":"(\d+)"', line)[1])
            called = re.findall(
                r"(?:\w*body|\w*condition|\w*calls|to_apply|\w+_computation)=%?([\w.\-]+)",
                line,
            )
            called += re.findall(
                r"[\w.\-]+", "".join(re.findall(r"branch_computations=\{(.*?)\}", line))
            )
            for other in called:
                yield from of_computation(other, inside)

    return list(of_computation(entry, 1))


def bytes_of(found: list[Collective]) -> dict[str, int]:
    """Bytes that one run moves, by kind of collective."""
    total: dict[str, int] = {}
    for c in found:
        total[c.op] = total.get(c.op, 0) + c.bytes * c.times
    return total


def _size(dtype, dims):
    return _BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
