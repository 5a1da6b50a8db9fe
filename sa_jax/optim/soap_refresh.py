"""Refreshes the bases of the fast SOAP, and decides which are refreshed at which step."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sa_jax.optim.soap_layout import StackPlan
from sa_jax.optim.soap_linalg import HIGH, refreshed_bases, rotate
from sa_jax.optim.soap_state import Stack

# What reaches the losses of an eigendecomposition (with less, columns of small eigenvalues are
# still those of the identity).
_FIRST_ITERATIONS, _FIRST_LIFT = 8, 1e-2


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
    """New bases for some matrices, if they are due; one after the other, to take less memory.

    The averages `mu` are re-expressed in the new bases, exactly; `nu` stays, slot by slot.

    Args:
      due: bool scalar.
      first: whether these are the first bases, which start at the identity.

    Returns:
      All stacks; and by stack, which matrices keep an old basis because the new one could not be
      used, bool [n].
    """
    # The first basis is reached in several iterations, of a factor that is singular still.
    iterations = jnp.where(first, _FIRST_ITERATIONS, 1)
    lift = jnp.where(first, _FIRST_LIFT, 0.0)
    chosen = {part.name: stacks[part.name] for part in parts}
    none = {name: jnp.zeros(stack.mu.shape[0], bool) for name, stack in stacks.items()}

    def new():
        refreshed = {
            part.name: _refresh_part(chosen[part.name], part, iterations, lift) for part in parts
        }
        return {k: v[0] for k, v in refreshed.items()}, {k: v[1] for k, v in refreshed.items()}

    refreshed, kept = jax.lax.cond(
        due, new, lambda: (chosen, {name: none[name] for name in chosen})
    )
    return stacks | refreshed, none | kept


def _refresh_part(
    stack: Stack, part: Part, iterations: jax.Array, lift: jax.Array
) -> tuple[Stack, jax.Array]:
    """(stack, whether a new basis of a matrix could not be used, bool [n])"""

    def one(i: jax.Array, carry: tuple[Stack, jax.Array]) -> tuple[Stack, jax.Array]:
        stack, kept = carry
        old = [q[i] for q in (stack.q_rows, stack.q_cols) if q is not None]
        factors = [gg[i] for gg in (stack.gg_rows, stack.gg_cols) if gg is not None]
        new, good = _new_bases(factors, old, iterations, lift)
        # From coordinates in the old basis to those in the new one.
        turns = [
            jnp.einsum("kij,kil->kjl", a, b, precision=HIGH)[None]
            for a, b in zip(old, new, strict=True)
        ]
        rows, cols = turns if len(turns) == 2 else (turns[0], None)
        mu = rotate(stack.mu[i][None], cols, rows, jnp.float32, HIGH)[0].mT
        stack = dataclasses.replace(
            stack,
            mu=stack.mu.at[i].set(mu),
            q_rows=stack.q_rows.at[i].set(new[0]),
            q_cols=None if cols is None else stack.q_cols.at[i].set(new[1]),
        )
        return stack, kept.at[i].set(~good)

    kept = jnp.zeros(stack.mu.shape[0], bool)
    return jax.lax.fori_loop(part.start, part.stop, one, (stack, kept))


def _new_bases(
    factors: Sequence[jax.Array], old: Sequence[jax.Array], iterations: jax.Array, lift: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """(bases [k, b, b] of each side of a matrix, whether all could be used)"""
    if len({q.shape[-1] for q in old}) == 1:  # all in one batch of QR
        made, good = refreshed_bases(
            jnp.concatenate(factors), jnp.concatenate(old), iterations, lift
        )
        ends = list(itertools.accumulate(len(q) for q in old))
        return jnp.split(made, ends[:-1]), jnp.all(good)
    sides = [refreshed_bases(gg, q, iterations, lift) for gg, q in zip(factors, old, strict=True)]
    return [made for made, _ in sides], jnp.all(jnp.concatenate([good for _, good in sides]))
