"""What a compiled step sends between devices, read from its HLO text.

XLA's cost analysis counts the body of a loop once; this module counts it as often as it runs.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

from sa_jax.planning.hlo import Instruction, Module, parse_module, shape_bytes, tuple_parts

BETWEEN_SLICES = " between slices"
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# What libtpu makes of a collective between slices: each host sends, and its network sums.
_MEGASCALE = re.compile('_xla_megascale_transfer_type="([A-Z_]+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CHAIN = re.compile(r'\bchain_id="(\d+)"')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step: how many run, and the bytes of their larger side on one
    device (the gathered result, the unreduced input)."""

    count: int
    bytes: int


def read_collectives(hlo: str, devices_a_slice: int = 0) -> dict[str, Traffic]:
    """Collectives of one execution of a module, by kind, for the kinds that occur.

    Traffic between slices is a separate kind, such as 'all-reduce between slices'. A loop with an
    unknown number of iterations counts once.

    Args:
      hlo: text of a partitioned module (`compiled.as_text()`).
      devices_a_slice: the number of devices in each slice, in the order of the module's devices;
        0: there is one slice.
    """
    module = parse_module(hlo)
    counts: dict[str, int] = collections.Counter()
    totals: dict[str, int] = collections.Counter()
    first_parts: dict[str, str] = {}
    for instruction, times in _executed(module, module.entry):
        kind = collective_kind(instruction)
        if kind and (chain := chain_of(instruction)):
            if first_parts.setdefault(chain, instruction.name) != instruction.name:
                continue
        groups = instruction.groups() if kind and devices_a_slice else []
        if any(len({device // devices_a_slice for device in group}) > 1 for group in groups):
            kind += BETWEEN_SLICES
        elif sent := _MEGASCALE.search(instruction.rest if instruction.opcode == "send" else ""):
            kind = sent[1].lower().replace("_", "-") + BETWEEN_SLICES
        if kind:
            counts[kind] += times
            totals[kind] += times * payload(instruction)
    kinds = [kind + suffix for suffix in ("", BETWEEN_SLICES) for kind in KINDS]
    return {kind: Traffic(counts[kind], totals[kind]) for kind in kinds if counts[kind]}


def collective_kind(instruction: Instruction) -> str:
    """'all-gather' for an all-gather or all-gather-start; '' for other instructions."""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and instruction.computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"  # libtpu's fusion of an all-reduce and the slice that is kept
    return kind if kind in KINDS else ""


def chain_of(collective: Instruction) -> str:
    """What the parts of one collective share that libtpu spreads over several fusions, each of
    which has a copy of the instruction; '' for other collectives."""
    channel, chain = _CHANNEL.search(collective.rest), _CHAIN.search(collective.rest)
    return f"{channel[1]} {chain[1]}" if channel and chain else ""


def payload(instruction: Instruction) -> int:
    """Bytes of a collective's larger side, result or operands."""
    shapes = shape_bytes(instruction.shape)
    if instruction.opcode == "send":
        return max(shapes)  # it has a context
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        # Operands and results, each a tuple where XLA has combined several collectives.
        return max(sum(shape_bytes(side)) for side in tuple_parts(instruction.shape))
    # A reduce-scatter's input is its result times the group.
    scattered = instruction.opcode == "reduce-scatter"
    return sum(shapes) * (len(instruction.groups()[0]) if scattered else 1)


def _executed(module: Module, name: str, times: int = 1) -> Iterator[tuple[Instruction, int]]:
    """Every instruction that runs, and how often."""
    for instruction in module.computations.get(name, ()):
        yield instruction, times
        # A reduction's to_apply holds no collectives; walking into it costs nothing.
        trips = module.trips(instruction)
        for callee in instruction.callees():
            yield from _executed(module, callee, times * trips)
