"""Refreshes the bases of the fast SOAP, and decides which are refreshed at which step."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sa_jax.optim.soap_layout import StackPlan
from sa_jax.optim.soap_linalg import refreshed_bases, rotate
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
    """New bases for some matrices, if they are due: one batch of QR per block size.

    The averages `mu` are re-expressed in the new bases, exactly; `nu` stays, slot by slot.

    Args:
      due: bool scalar.
      first: whether these are the first bases, which start at the identity.

    Returns:
      All stacks; and by stack, which matrices keep an old basis because the new one could not be
      used, bool [n].
    """
    chosen = {part.name: _slice(stacks[part.name], part) for part in parts}
    # The first basis is reached in several iterations, of a factor that is singular still.
    iterations = jnp.where(first, _FIRST_ITERATIONS, 1)
    lift = jnp.where(first, _FIRST_LIFT, 0.0)

    def new():
        return _refreshed(chosen, iterations, lift)

    def unchanged():
        none = {name: jnp.zeros(s.mu.shape[0], bool) for name, s in chosen.items()}
        return {name: (s.mu, s.q_rows, s.q_cols) for name, s in chosen.items()}, none

    made, kept = jax.lax.cond(due, new, unchanged)
    stacks = dict(stacks)
    rejected = {name: jnp.zeros(stack.mu.shape[0], bool) for name, stack in stacks.items()}
    for part in parts:
        old, where = stacks[part.name], slice(part.start, part.stop)
        mu, q_rows, q_cols = made[part.name]
        stacks[part.name] = dataclasses.replace(
            old,
            mu=old.mu.at[where].set(mu),
            q_rows=None if q_rows is None else old.q_rows.at[where].set(q_rows),
            q_cols=None if q_cols is None else old.q_cols.at[where].set(q_cols),
        )
        rejected[part.name] = rejected[part.name].at[where].set(kept[part.name])
    return stacks, rejected


def _refreshed(stacks: dict[str, Stack], iterations: jax.Array, lift: jax.Array):
    """({stack: (mu, q_rows, q_cols)}, {stack: a new basis was no good [n]})"""
    sides = {
        (name, side): (getattr(stack, f"gg_{side}"), getattr(stack, f"q_{side}"))
        for name, stack in stacks.items()
        for side in ("rows", "cols")
        if getattr(stack, f"gg_{side}") is not None
    }
    bases, good = {}, {}
    for block in sorted({gg.shape[-1] for gg, _ in sides.values()}):
        members = {key: pair for key, pair in sides.items() if pair[0].shape[-1] == block}
        gg, q = (
            jnp.concatenate([pair[i].reshape(-1, block, block) for pair in members.values()])
            for i in range(2)
        )
        made, orthogonal = refreshed_bases(gg, q, iterations, lift)
        start = 0
        for key, (_, old) in members.items():
            stop = start + old.shape[0] * old.shape[1]
            bases[key] = made[start:stop].reshape(old.shape)
            good[key] = jnp.all(orthogonal[start:stop].reshape(old.shape[:2]), axis=1)
            start = stop

    def turn(key: tuple[str, str]) -> jax.Array | None:
        """From coordinates in the old basis to those in the new one."""
        if key not in bases:
            return None
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("nkij,nkil->nkjl", sides[key][1], bases[key], precision=highest)

    turned, kept = {}, {}
    for name, stack in stacks.items():
        rows, cols = (name, "rows"), (name, "cols")
        mu = rotate(stack.mu, turn(rows), turn(cols), jnp.float32)
        turned[name] = (mu, bases.get(rows), bases.get(cols))
        kept[name] = ~(good.get(rows, True) & good.get(cols, True))
    return turned, kept


def _slice(stack: Stack, part: Part) -> Stack:
    return jax.tree.map(lambda x: x[part.start : part.stop], stack)
