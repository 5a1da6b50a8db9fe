"""The compiler's clock: seconds of a compiled TPU step, from libtpu's own `estimated_cycles`.

The text of an executable is its schedule. The clock replays it, one instruction after another, and
each loop as often as it runs. docs/scale.md compares the result with published speeds.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable

from sa_jax.parallel.hardware import Chip
from sa_jax.planning.collectives import chain_of, collective_kind, payload
from sa_jax.planning.hlo import Instruction, Module, parse_module

# The assumed share of the matrix units' peak that a splash kernel reaches on the unmasked half of
# its scores, because libtpu does not estimate custom calls. It is not fitted: docs/scale.md.
ATTENTION_SHARE = 0.5

ASSUMPTIONS = (
    "products, other fusions and copies take the cycles that libtpu estimates; it knows no stalls",
    "a collective takes its bytes over one direction of one link in each dimension of the torus; "
    "asynchronous ones run beside what is scheduled until their end is awaited",
    f"splash attention reaches {100 * ATTENTION_SHARE:.0f} % of the matrix units' peak on half of "
    "the scores; other custom calls, and prefetches into vector memory, take no time",
)

_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_SPLASH = re.compile(r"splash_\w+?_(fwd|dq|dkv)")
_PRODUCTS = {"convolution", "dot"}
_MOVES = {"parameter", "copy", "transpose", "bitcast", "reshape"}


@dataclasses.dataclass(frozen=True)
class Clock:
    """Seconds of one step on one device; the kinds add up to the step."""

    products: float = 0.0
    attention: float = 0.0
    fusions: float = 0.0  # everything else that libtpu estimates
    copies: float = 0.0
    collectives: float = 0.0  # waiting for the links
    conditionals: int = 0  # in the text; `branch` of `read_clock` chose a branch of each

    @property
    def step(self) -> float:
        return self.products + self.attention + self.fusions + self.copies + self.collectives


def read_clock(hlo: str, chip: Chip, branch: Callable[[Iterable[float]], float] = min) -> Clock:
    """The clock of one execution.

    Args:
      hlo: text of a TPU executable (`compiled.as_text()`), which is scheduled.
      branch: `max` or `min`: which branch of a conditional counts, by its seconds.
    """
    module = parse_module(hlo)
    instructions = itertools.chain.from_iterable(module.computations.values())
    conditionals = sum(each.opcode == "conditional" for each in instructions)
    return Clock(**_replay(module, module.entry, chip, branch), conditionals=conditionals)


def _replay(
    module: Module, name: str, chip: Chip, branch: Callable[[Iterable[float]], float]
) -> dict[str, float]:
    """Seconds by kind of one execution of a computation."""
    spent: dict[str, float] = collections.defaultdict(float)
    now = links_free = 0.0
    arrival: dict[str, float] = {}  # of asynchronous collectives, by the name of their start
    named = {each.name: each for each in module.computations[name]}
    for instruction in module.computations[name]:
        opcode = instruction.opcode
        within: dict[str, float] = {}
        if opcode == "while":
            turn = _replay(module, instruction.attribute("body"), chip, branch)
            within = {kind: module.trips(instruction) * value for kind, value in turn.items()}
        elif opcode == "conditional":
            branches = [_replay(module, callee, chip, branch) for callee in instruction.callees()]
            totals = [sum(each.values()) for each in branches]
            within = branches[totals.index(branch(totals))]
        elif opcode == "call":
            within = _replay(module, instruction.attribute("to_apply"), chip, branch)
        elif collectives := _collectives(module, instruction, named):
            end = now
            for collective in collectives:
                chain = chain_of(collective)
                if chain not in arrival:
                    links_free = max(now, links_free) + _bytes(collective) / link_bandwidth(chip)
                    arrival[chain or instruction.name] = links_free
                if _ends(instruction, collective):
                    end = max(end, arrival.pop(chain or instruction.name))
            within = {"collectives": end - now}
        elif opcode.endswith("-done") and instruction.operand() in arrival:
            within = {"collectives": max(0.0, arrival[instruction.operand()] - now)}
        kind, seconds = _own_time(module, instruction, chip)
        if kind:
            # A collective inside a fusion runs beside the rest of it.
            waited = max(0.0, within.get("collectives", 0.0) - seconds)
            within = {"collectives": waited, kind: seconds}
        for within_kind, value in within.items():
            spent[within_kind] += value
            now += value
    return spent


def link_bandwidth(chip: Chip) -> float:
    """Bytes/s that a device receives in a collective: one direction of one link per dimension."""
    return chip.torus * chip.link_bandwidth / chip.devices


def _collectives(
    module: Module, instruction: Instruction, named: dict[str, Instruction]
) -> list[Instruction]:
    """The collectives that an instruction starts, continues or runs: itself, or those inside it."""
    inside = [instruction]
    if instruction.opcode in ("fusion", "async-start"):
        inside = module.computations.get(instruction.attribute("calls"), [])
    elif instruction.opcode == "call-start" and instruction.operand():  # on a SparseCore
        inside = module.computations.get(instruction.attribute("to_apply"), [])
    elif instruction.opcode == "call-update":  # what it sends was not known at its start
        start = named.get(instruction.operand())
        inside = module.computations.get(start.attribute("to_apply"), []) if start else []
    return [each for each in inside if collective_kind(each)]


def _ends(instruction: Instruction, collective: Instruction) -> bool:
    """Whether a collective has to arrive before the next instruction."""
    if chain_of(collective):
        return instruction.name.startswith("async-collective-done")
    return not instruction.opcode.endswith(("-start", "-update"))


def _bytes(collective: Instruction) -> float:
    """Bytes that a device receives in a collective."""
    kind = collective_kind(collective)
    others = 1 - 1 / len(collective.groups()[0]) if kind != "collective-permute" else 1
    return payload(collective) * others * (2 if kind == "all-reduce" else 1)


def _own_time(module: Module, instruction: Instruction, chip: Chip) -> tuple[str, float]:
    """(kind, seconds) of an instruction that computes; ('', 0) for others."""
    cycles = _CYCLES.search(instruction.rest)
    seconds = int(cycles[1]) / chip.clock_hz if cycles else 0.0
    if instruction.opcode == "custom-call":
        if not _SPLASH.match(instruction.name):
            return "", 0.0
        if not cycles:
            flops = splash_flops(instruction) * chip.devices
            seconds = flops / (ATTENTION_SHARE * chip.flops)
        return "attention", seconds
    if not cycles:
        return "", 0.0
    opcodes = _opcodes(module, instruction)
    if opcodes & _PRODUCTS:
        return "products", seconds
    return ("copies" if opcodes <= _MOVES else "fusions"), seconds


def _opcodes(module: Module, instruction: Instruction) -> set[str]:
    """The opcode of an instruction, or those of all in its fusion."""
    inside = module.computations.get(instruction.attribute("calls"))
    if inside is None:
        return {instruction.opcode}
    return set().union(*(_opcodes(module, each) for each in inside))


def splash_flops(call: Instruction) -> float:
    """FLOPs of a splash kernel on the causal half of its scores; 0 for other custom calls."""
    if not (kernel := _SPLASH.match(call.name)):
        return 0.0
    # Products over [S, S, head_dim]: scores and output; for dQ scores, dP and dQ; for dK and dV
    # scores, dP, dK and dV. The first operand of floats is the queries' [B, heads, S, head_dim], or
    # without B where a device has one row.
    products = {"fwd": 2, "dq": 3, "dkv": 4}[kernel[1]]
    shape = re.search(r"\b(?:bf16|f32)\[((?:\d+,){2,3}\d+)\]", call.rest)
    assert shape is not None, call.rest[:200]
    *rows, s, h = map(int, shape[1].split(","))
    return products * math.prod((*rows, s, s, h))
