"""Memory traffic and bytes exchanged between devices, read from a compiled program's HLO.

XLA's own `cost_analysis` counts the body of a loop once. These functions count it once per
iteration, and count all branches of a conditional.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVES = {"all-gather", "all-reduce", "all-to-all", "collective-permute"}
BETWEEN_SLICES = "between slices"  # an exchange over the network between TPU slices
_COLLECTIVES |= {"ragged-all-to-all", "reduce-scatter", BETWEEN_SLICES}
# Instructions that do not read or write memory themselves.
_NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"}
_NO_TRAFFIC |= {"conditional", "call", "after-all", "partition-id", "replica-id", "iota"}
_SLICES = {"dynamic-slice", "slice", "gather"}


class Collective(NamedTuple):
    op: str
    bytes: int  # size of the result on a single device
    times: int  # number of executions in one run of the program


class _Instruction(NamedTuple):
    op: str
    result: str  # shapes in HLO syntax, such as f32[8,128]
    line: str

    def operands(self) -> list[str]:
        """Return the names of the operands."""
        return re.findall(
            r"%([\w.\-]+)", self.line.partition(f" {self.op}(")[2].partition(")")[0]
        )


_Computation = dict[str, _Instruction]  # instructions, keyed by name


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """Return all collectives that one run of the program executes."""
    found = []
    for i, _, times, _ in _executed(_parse(compiled)):
        op = i.op.removesuffix("-start")
        if op == "send" and "megascale" in i.line:
            op = BETWEEN_SLICES
        if op in _COLLECTIVES:
            found.append(Collective(op, _size(_result(i)), times))
    return found


def bytes_by_kind(found: list[Collective]) -> dict[str, int]:
    """Return the total bytes of the collectives' results, keyed by kind of collective."""
    total: dict[str, int] = {}
    for c in found:
        total[c.op] = total.get(c.op, 0) + c.bytes * c.times
    return total


def instructions(compiled: jax.stages.Compiled) -> list[str]:
    """Return the opcodes of instructions outside fusions, with loop bodies listed once."""
    return [i.op for i, _, _, is_fused in _executed(_parse(compiled)) if not is_fused]


def memory_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the bytes that one run reads and writes in the memory of a single device.

    Arrays that the TPU compiler places in fast on-chip memory, S(1), are not counted.
    """
    computations = _parse(compiled)
    return sum(
        times * _traffic(i, computation, computations)
        for i, computation, times, is_fused in _executed(computations)
        if not is_fused
    )


def _result(i: _Instruction) -> str:
    """Return a result's shapes, without the operands that an asynchronous start returns."""
    if i.op not in ("all-gather-start", "collective-permute-start"):
        return i.result
    arrays = re.findall(r"\w+\[\d[\d,]*\]", i.result)  # skips a permute's extra scalars
    return " ".join(arrays[len(arrays) // 2 :])


def _traffic(
    i: _Instruction, computation: _Computation, computations: dict[str, _Computation]
) -> int:
    """Return the bytes that an instruction reads and writes."""
    if i.op in _NO_TRAFFIC or i.op.endswith("-start"):
        return 0
    if i.op.endswith("-done"):  # ends a copy between memory spaces, or a collective
        return _size(i.result)
    operands = [_size(computation[name].result, "S(1)") for name in i.operands()]
    result = _size(i.result, "S(1)")
    if i.op in _SLICES:
        return 2 * result
    if i.op == "dynamic-update-slice":
        return 2 * operands[1]
    if i.op != "fusion":
        return sum(operands) + result
    fused = computations[_called(i.line)[0]]
    read = [_bytes_read(n, fused, computations) for n in _parameters(fused)]
    return sum(map(min, operands, read)) + min(result, _bytes_written(fused))


def _bytes_read(
    name: str, fused: _Computation, computations: dict[str, _Computation]
) -> int:
    """Return how many bytes of a value a fusion reads: all bytes, or only some slices."""
    total = 0
    for user_name, user in fused.items():
        operands = user.operands()
        if name not in operands:
            continue
        if user.op == "bitcast":
            total += _bytes_read(user_name, fused, computations)
        elif user.op == "fusion":
            inner = computations[_called(user.line)[0]]
            parameter = _parameters(inner)[operands.index(name)]
            total += _bytes_read(parameter, inner, computations)
        elif user.op in _SLICES:
            total += _size(user.result)
        elif user.op != "dynamic-update-slice" or name != operands[0]:
            return _size(fused[name].result)
    return total


def _bytes_written(fused: _Computation) -> int:
    """Return the bytes a fusion writes: whole results, or slices updated in place."""
    [root] = [i for i in fused.values() if i.line.lstrip().startswith("ROOT")]
    total = 0
    for i in [fused[n] for n in root.operands()] if root.op == "tuple" else [root]:
        while i.op == "bitcast":
            i = fused[i.operands()[0]]
        updates = i.op == "dynamic-update-slice"
        total += _size((fused[i.operands()[1]] if updates else i).result)
    return total


def _parameters(fused: _Computation) -> list[str]:
    """Return the names of a computation's parameters, sorted by parameter number."""
    numbers = {
        name: int(i.line.partition(" parameter(")[2].partition(")")[0])
        for name, i in fused.items()
        if i.op == "parameter"
    }
    return sorted(numbers, key=lambda name: numbers[name])


def _parse(compiled: jax.stages.Compiled) -> dict[str, _Computation]:
    """Return a program's computations, keyed by name. The entry computation has key ""."""
    computations, name = {}, None
    for line in (compiled.as_text() or "").splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = "" if header[1] else header[2]
            computations[name] = {}
        match = re.search(r"%?([\w.\-]+) = (.*?) ([\w\-]+)\(", line)
        if match and name is not None:
            computations[name][match[1]] = _Instruction(match[3], match[2], line)
    return computations


def _executed(
    computations: dict[str, _Computation],
    name: str = "",
    times: int = 1,
    is_fused: bool = False,
) -> Iterator[tuple[_Instruction, _Computation, int, bool]]:
    """Yield each executed instruction, its computation, execution count and `is_fused`.

    `is_fused` is true inside a fusion, which keeps intermediate values in registers.
    """
    for i in computations[name].values():
        yield i, computations[name], times, is_fused
        inside = times * _iterations(i, computations) if i.op == "while" else times
        for called in _called(i.line):
            yield from _executed(computations, called, inside, is_fused or i.op == "fusion")


def _called(line: str) -> list[str]:
    """Return the names of the computations that an instruction calls."""
    pattern = r"(?:\w*body|\w*condition|\w*calls|to_apply|\w+_computation)=%?([\w.\-]+)"
    branches = "".join(re.findall(r"branch_computations=\{(.*?)\}", line))
    return re.findall(pattern, line) + re.findall(r"[\w.\-]+", branches)


def _iterations(i: _Instruction, computations: dict[str, _Computation]) -> int:
    """Return the number of iterations of a loop, or 1 if the number is unknown.

    It is unknown for the loop of `hold_unclipped` over all entries, which usually does not
    run at all. The TPU compiler does not annotate a `scan` with its length, so the length
    is read from the loop's condition, which compares an index with the length.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', i.line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", i.line)
    lines = [j.line for j in computations[condition[1]].values()] if condition else []
    limits = [re.search(r"s32\[\]\S* constant\((\d+)\)", line) for line in lines]
    compares = any("direction=LT" in line for line in lines)
    found = [int(limit[1]) for limit in limits if limit]
    return found[0] if compares and len(found) == 1 else 1


def _size(text: str, excluded: str = "no layout") -> int:
    """Return the total bytes of the shapes in HLO text whose layouts lack `excluded`."""
    return sum(
        _BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{.*?\})?", text)
        if excluded not in layout
    )
