"""Batches: the rows of a step are a pure function of (seed, step), without any iterator state.

The permutations of all epochs form one infinite sequence. Step s takes rows s·B to s·B + B − 1 of
it. So every row comes once per epoch, and a batch may contain the end of one epoch and the start of
the next.
"""

import functools

import numpy as np

from sa_jax.data import randomness
from sa_jax.data.packing import PackedDataset
from sa_jax.errors import UsageError


def steps_per_epoch(dataset: PackedDataset, batch_size: int) -> int:
    """Steps after which every row was seen at least once: rows / batch_size, rounded up. If
    batch_size does not divide the rows, the last step also takes rows of the next epoch."""
    return -(-len(dataset) // batch_size)


def row_indices(dataset_rows: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Row numbers of the global batch of `step` (from 0), int64 [batch_size]."""
    place = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(place, dataset_rows)
    numbers = zip(epochs.tolist(), offsets.tolist(), strict=True)
    return np.array([_epoch_order(dataset_rows, seed, epoch)[offset] for epoch, offset in numbers])


def batch(
    dataset: PackedDataset, seed: int, step: int, batch_size: int, rows: slice | None = None
) -> dict[str, np.ndarray]:
    """The batch of one step, or this host's slice `rows` of it; the same bytes for any number of
    hosts.

    Returns [b, S] arrays: tokens, targets, positions, segment_ids (int32) and loss_mask (bool).
    Position t predicts targets[t] = tokens[t+1] of the same document; loss_mask belongs to targets.
    A document's last position, and padding, have target 0 and mask False.
    """
    if batch_size < 1 or step < 0:
        needed = "batch_size must be at least 1 and step at least 0"
        raise UsageError(f"{needed}; got {batch_size} and {step}")
    indices = row_indices(len(dataset), seed, step, batch_size)[rows or slice(None)]
    arrays = dataset.rows(indices)
    segment_ids = arrays["segment_ids"]
    goes_on = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    targets = np.zeros_like(arrays["tokens"])
    targets[:, :-1] = np.where(goes_on, arrays["tokens"][:, 1:], 0)
    loss_mask = np.zeros_like(arrays["loss_mask"])
    loss_mask[:, :-1] = arrays["loss_mask"][:, 1:] & goes_on
    return arrays | {"targets": targets, "loss_mask": loss_mask}


@functools.lru_cache(maxsize=4)
def _epoch_order(dataset_rows: int, seed: int, epoch: int) -> np.ndarray:
    return randomness.permutation(dataset_rows, "epoch", seed, epoch)
