"""Compiled programs as text (`compiled.as_text()`): computations, instructions, loops, bytes."""

import dataclasses
import math
import re

import numpy as np

_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_ITEM_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
# A shape's layout, `{1,0:T(8,128)}`, has no lower-case word before a parenthesis.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_CALLEES = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=(\S+)")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(rest`."""

    name: str
    shape: str
    opcode: str
    rest: str  # the operands and the attributes
    computation: str  # the name of the one that it is part of

    def attribute(self, key: str) -> str:
        """The computation that an attribute names, `body=%body.1`; '' where there is none."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return match[1] if match else ""

    def callees(self) -> list[str]:
        """All computations that it names."""
        named = (many or one for many, one in _CALLEES.findall(self.rest))
        return [name.strip().lstrip("%") for names in named for name in names.split(",")]

    def operand(self) -> str:
        """The name of its first operand."""
        match = re.match(r"(?:[^%\s]\S* )?%([\w.\-]+)", self.rest)
        return match[1] if match else ""

    def groups(self) -> list[list[int]]:
        """The devices of each group of a collective; [[0]] if the text does not say."""
        if groups := _LISTED_GROUPS.search(self.rest):
            return [_numbers(group) for group in re.findall(r"\d[\d,]*", groups[1])]
        if groups := _IOTA_GROUPS.search(self.rest):
            return _devices(groups[2]).reshape(_numbers(groups[1])).tolist()
        if groups := _MESH_GROUPS.search(self.rest):
            sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", groups[1])}
            shape = [*sizes.values()]
            inner = [[*sizes].index(axis) for axis in re.findall(r"'(\w+)'", groups[3])]
            ids = _devices(groups[2] or f"[{math.prod(shape)}]").reshape(shape)
            ids = np.moveaxis(ids, inner, range(-len(inner), 0))
            return ids.reshape(-1, math.prod(shape[axis] for axis in inner)).tolist()
        return [[0]]


def _devices(text: str) -> np.ndarray:
    """The devices in a list such as `[8]`, `[2,4]T(1,0)` (transposed) or `3,1,2,0`."""
    if not (iota := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)):
        return np.array(_numbers(text))
    shape = _numbers(iota[1])
    order = _numbers(iota[2]) if iota[2] else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [*map(int, text.split(","))]


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, in the order in which the text has their instructions."""

    computations: dict[str, list[Instruction]]
    entry: str

    def trips(self, instruction: Instruction) -> int:
        """Iterations of a while loop; 1 if the text does not say, and for other instructions."""
        if known := _TRIPS.search(instruction.rest):
            return int(known[1])
        # TPU text does not say: a scan's condition is `counter < constant`.
        limits = [
            int(limit[1])
            for other in self.computations.get(instruction.attribute("condition"), ())
            if other.opcode == "constant" and other.shape.startswith(("s32[]", "u32[]"))
            if (limit := re.match(r"(\d+)\)", other.rest))
        ]
        return limits[0] if len(limits) == 1 else 1


def parse_module(hlo: str) -> Module:
    """The module that a text describes; of a partitioned one, what one device runs."""
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            computations.setdefault(name, [])
            entry = name if head[1] else entry
        elif name and (match := _INSTRUCTION.match(line)):
            computations[name].append(Instruction(match[1], match[2], match[3], match[4], name))
    return Module(computations, entry)


def shape_bytes(text: str) -> list[int]:
    """Bytes of each array shape in a text such as `(f32[8,128]{1,0}, u32[])`."""
    return [
        math.prod(int(size) for size in dimensions.split(",") if size) * _ITEM_BYTES.get(dtype, 0)
        for dtype, dimensions in _SHAPE.findall(text)
    ]


def tuple_parts(shape: str) -> list[str]:
    """The elements of a tuple such as `((f32[8,4]{1,0}, u32[]), f32[])`, inner tuples whole."""
    parts, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts
