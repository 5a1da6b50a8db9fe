"""Refreshes the bases of the fast SOAP, and decides which are refreshed at which step."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sa_jax.optim.soap_layout import Stack, StackPlan
from sa_jax.optim.soap_linalg import IN_THREE_PASSES, refreshed_bases, rotate, three_passes

# What reaches the losses of an eigendecomposition (with less, columns of small eigenvalues are
# still those of the identity).
_FIRST_ITERATIONS, _FIRST_LIFT = 8, 1e-2

# Numbers in the matrices and bases that are refreshed at once: 0.25 GiB in float32.
_AT_ONCE = 2**26


class Part(NamedTuple):
    """Matrices [start, stop) of a stack on each device."""

    name: str
    start: int
    stop: int


def cut_into_slots(
    plans: Sequence[StackPlan], counts: Sequence[int], slots: int
) -> list[list[Part]]:
    """A device's matrices (`counts` of each stack), in order, in parts of about equal cost.

    If there are more slots than matrices, some slots are empty.
    """
    costs = [sum(s.blocks * s.block**3 for s in (plan.rows, plan.cols)) for plan in plans]
    total = sum(cost * count for cost, count in zip(costs, counts, strict=True))
    parts_of_slot: list[list[Part]] = [[] for _ in range(slots)]
    done = 0
    for plan, cost, count in zip(plans, costs, counts, strict=True):
        slot_of = [int((done + cost * (i + 0.5)) / total * slots) for i in range(count)]
        done += cost * count
        for slot in sorted(set(slot_of)):
            first = slot_of.index(slot)
            parts_of_slot[slot].append(Part(plan.name, first, first + slot_of.count(slot)))
    return parts_of_slot


def refresh(
    stacks: dict[str, Stack], parts: Sequence[Part], due: jax.Array, first: jax.Array
) -> tuple[dict[str, Stack], dict[str, jax.Array]]:
    """New bases for some matrices, if they are due; a few at a time, to take less memory.

    The averages `mu` are turned from the old bases to the new ones; `nu` stays, slot by slot.

    Args:
      due: bool scalar.
      first: whether these are the first bases, which start at the identity.

    Returns:
      All stacks; and by name, for the stacks with parts, which matrices keep an old basis because
      the new one could not be used, bool [n].
    """
    # The first basis is reached in several iterations, of a factor that is singular still.
    iterations = jnp.where(first, _FIRST_ITERATIONS, 1)
    lift = jnp.where(first, _FIRST_LIFT, 0.0)
    unchanged = {
        part.name: (stacks[part.name], jnp.zeros(stacks[part.name].mu_ncr.shape[0], bool))
        for part in parts
    }

    def new() -> dict[str, tuple[Stack, jax.Array]]:
        return {
            part.name: _refresh_part(*unchanged[part.name], part, iterations, lift)
            for part in parts
        }

    refreshed = jax.lax.cond(due, new, lambda: unchanged)
    return (
        stacks | {name: stack for name, (stack, _) in refreshed.items()},
        {name: kept for name, (_, kept) in refreshed.items()},
    )


def _refresh_part(
    stack: Stack, kept: jax.Array, part: Part, iterations: jax.Array, lift: jax.Array
) -> tuple[Stack, jax.Array]:
    """(stack, `kept` with the part's matrices whose new basis could not be used, bool [n])"""
    together = _matrices_together(stack, part.stop - part.start)

    def some(turn: jax.Array, carry: tuple[Stack, jax.Array]) -> tuple[Stack, jax.Array]:
        stack, kept = carry
        first = part.start + turn * together

        def read(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, first, together)

        def write(x: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, new, first, 0)

        factors = [read(gg) for gg in (stack.gg_rows, stack.gg_cols) if gg is not None]
        old = [read(q) for q in (stack.q_rows, stack.q_cols) if q is not None]
        new, good = _new_bases(factors, old, iterations, lift)
        # From coordinates in the old basis to those in the new one.
        rows, cols = [
            three_passes("nkij,nkil->nkjl", a, b) for a, b in zip(old, new, strict=True)
        ] + [None] * (2 - len(new))
        mu = rotate(read(stack.mu_ncr), cols, rows, IN_THREE_PASSES).mT
        stack = dataclasses.replace(
            stack,
            mu_ncr=write(stack.mu_ncr, mu),
            q_rows=write(stack.q_rows, new[0]),
            q_cols=None if cols is None else write(stack.q_cols, new[1]),
        )
        return stack, write(kept, ~good)

    turns = (part.stop - part.start) // together
    return jax.lax.fori_loop(0, turns, some, (stack, kept))


def _matrices_together(stack: Stack, count: int) -> int:
    """The most of `count` matrices, in equal parts, whose arrays have `_AT_ONCE` numbers: small
    matrices share a QR, and large ones do not all have their temporaries at once."""
    arrays = jax.tree.leaves((stack.mu_ncr, stack.q_rows, stack.q_cols))
    each = sum(x.size // x.shape[0] for x in arrays)
    return max(
        n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * each <= _AT_ONCE)
    )


def _new_bases(
    factors: Sequence[jax.Array], old: Sequence[jax.Array], iterations: jax.Array, lift: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """(bases [n, k, b, b] of each side, whether both of a matrix could be used [n])"""
    made: list[jax.Array] = []
    good: list[jax.Array] = []
    # Sides with blocks of one size share a batch of QR.
    shared = len({q.shape[-1] for q in old}) == 1
    for sides in [range(len(old))] if shared else [[side] for side in range(len(old))]:
        blocks = [old[side].shape[1] for side in sides]
        gg, q = (jnp.concatenate([x[side] for side in sides], 1) for x in (factors, old))
        n, k, b, _ = q.shape
        q, fine = refreshed_bases(gg.reshape(n * k, b, b), q.reshape(n * k, b, b), iterations, lift)
        ends = list(itertools.accumulate(blocks))[:-1]
        made += jnp.split(q.reshape(n, k, b, b), ends, 1)
        good.append(jnp.all(fine.reshape(n, k), 1))
    return made, functools.reduce(jnp.logical_and, good)
