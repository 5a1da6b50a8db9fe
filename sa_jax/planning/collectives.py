"""What a compiled step sends between devices, read from its HLO text.

XLA's cost analysis counts the body of a loop once; here it counts as often as the loop runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_ITEM_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_OPERATION = re.compile(rf"\b({'|'.join(KINDS)})(-start)?\(")
_CALLEES = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=\{?([^,}\s]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step: how many run, and the bytes of their larger side on one
    device (the gathered result, the unreduced input)."""

    count: int
    bytes: int


def read_collectives(hlo: str) -> dict[str, Traffic]:
    """Collectives of one execution of a module, by kind.

    Args:
      hlo: text of a partitioned module (`compiled.as_text()`).

    Returns:
      Kind to traffic, kinds that do not occur left out. A loop whose number of turns the compiler
      does not know counts once.
    """
    bodies, entry = _computations(hlo)
    counts: dict[str, int] = collections.Counter()
    totals: dict[str, int] = collections.Counter()
    for line, times in _executed(bodies, entry):
        if operation := _OPERATION.search(line):
            counts[operation[1]] += times
            totals[operation[1]] += times * _payload(line, operation)
    return {kind: Traffic(counts[kind], totals[kind]) for kind in KINDS if counts[kind]}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction[1])
    return bodies, entry


def _executed(
    bodies: Mapping[str, list[str]], name: str, times: int = 1
) -> Iterator[tuple[str, int]]:
    """Every instruction that runs, with how often."""
    for line in bodies.get(name, ()):
        yield line, times
        # A reduction's to_apply holds no collectives; walking into it costs nothing.
        for callee in _CALLEES.findall(line):
            yield from _executed(bodies, callee.lstrip("%"), times * _trips(bodies, line))


def _trips(bodies: Mapping[str, list[str]], line: str) -> int:
    """Turns of a while loop; 1 for every other instruction."""
    if known := _TRIPS.search(line):
        return int(known[1])
    if not (condition := _CONDITION.search(line)):
        return 1
    # TPU text does not say: a scan's condition is `counter < constant`.
    limits = [
        int(limit[1])
        for other in bodies.get(condition[1], ())
        if (limit := re.match(r"[su]32\[\]\S* constant\((\d+)\)", other))
    ]
    return limits[0] if len(limits) == 1 else 1


def _payload(line: str, operation: re.Match) -> int:
    """The larger of result and operands, in bytes; a -start's result repeats its operand."""
    shapes = [_bytes(*shape) for shape in _SHAPE.findall(line[: operation.start()])]
    if operation[2]:
        return max(shapes)
    # A reduce-scatter's input is its result times the group.
    return sum(shapes) * (_group_size(line) if operation[1] == "reduce-scatter" else 1)


def _group_size(line: str) -> int:
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(groups[1])
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return groups[1].count(",") + 1
    if groups := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", groups[1]))
        return math.prod(int(sizes[axis]) for axis in groups[2].split(","))
    return 1


def _bytes(dtype: str, dimensions: str) -> int:
    sizes = [int(size) for size in dimensions.split(",") if size]
    return math.prod(sizes) * _ITEM_BYTES.get(dtype, 0)
