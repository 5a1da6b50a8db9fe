"""batch(seed, step): pure, host-independent, every row once an epoch, targets inside documents."""

import numpy as np
import pytest

from sa_jax.data.batches import batch, row_indices, steps_per_epoch
from sa_jax.data.conversations import Conversation, make_messages
from sa_jax.data.packing import pack
from sa_jax.errors import UsageError

SIZE = 16


@pytest.fixture(scope="module")
def dataset(byte_chat, tmp_path_factory):
    rng = np.random.default_rng(0)
    given = [
        Conversation(tuple(make_messages(f"p{i}", "a" * int(rng.integers(1, 90)))), "clean")
        for i in range(150)
    ]
    return pack(given, byte_chat, 160, cache_dir=tmp_path_factory.mktemp("cache"))


def test_shapes_and_types(dataset):
    found = batch(dataset, 0, 0, SIZE)
    assert {name: (a.shape, a.dtype.name) for name, a in found.items()} == {
        "tokens": ((SIZE, 160), "int32"),
        "targets": ((SIZE, 160), "int32"),
        "loss_mask": ((SIZE, 160), "bool"),
        "positions": ((SIZE, 160), "int32"),
        "segment_ids": ((SIZE, 160), "int32"),
    }


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_same_bytes_for_any_number_of_hosts(dataset, hosts):
    share = SIZE // hosts
    for step in (0, 3, 11, 1000):
        whole = batch(dataset, 7, step, SIZE)
        parts = [
            batch(dataset, 7, step, SIZE, slice(host * share, (host + 1) * share))
            for host in range(hosts)
        ]
        for name, array in whole.items():
            joined = np.concatenate([part[name] for part in parts])
            assert joined.dtype == array.dtype and joined.tobytes() == array.tobytes()


def test_every_row_once_an_epoch_and_another_order_each_epoch(dataset):
    rows = len(dataset)
    assert rows % SIZE  # so that batches cross the end of an epoch
    steps = steps_per_epoch(dataset, SIZE)
    assert steps == rows // SIZE + 1
    line = np.concatenate([row_indices(rows, 0, step, SIZE) for step in range(4 * steps)])
    epochs = [line[n * rows : (n + 1) * rows].tolist() for n in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(rows))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert row_indices(rows, 1, 0, SIZE).tolist() != line[:SIZE].tolist()
    # A batch larger than the data goes through several epochs.
    assert np.bincount(row_indices(rows, 0, 0, 3 * rows)).tolist() == [3] * rows


def test_pure_whatever_was_asked_before(dataset):
    np.random.seed(0)
    first = batch(dataset, 0, 5, SIZE)
    batch(dataset, 3, 1, SIZE), np.random.rand()
    again = batch(dataset, 0, 5, SIZE)
    assert all(again[name].tobytes() == first[name].tobytes() for name in first)


def test_order_is_frozen():
    """Runs resume on other machines and numpy versions, so these numbers must never change."""
    assert row_indices(10, 0, 0, 12).tolist() == [0, 2, 8, 3, 7, 4, 6, 5, 1, 9, 0, 9]
    assert row_indices(10, np.int64(0), np.int32(0), 12).tolist()[:4] == [0, 2, 8, 3]


def test_targets_are_the_next_token_of_the_same_document(dataset):
    found = batch(dataset, 0, 2, SIZE)
    rows = dataset.rows(row_indices(len(dataset), 0, 2, SIZE))
    pairs = losses = 0
    for b in range(SIZE):
        for t in range(160):
            segment = rows["segment_ids"][b, t]
            if segment and t + 1 < 160 and rows["segment_ids"][b, t + 1] == segment:
                assert found["targets"][b, t] == rows["tokens"][b, t + 1]
                assert found["loss_mask"][b, t] == rows["loss_mask"][b, t + 1]
                pairs += 1
                losses += int(rows["loss_mask"][b, t + 1])
            else:
                assert found["targets"][b, t] == 0 and not found["loss_mask"][b, t]
    assert pairs > 1000
    # No token under the loss is lost by the shift: none comes first in its document.
    assert losses == found["loss_mask"].sum() == rows["loss_mask"].sum()


def test_wrong_arguments(dataset):
    with pytest.raises(UsageError):
        batch(dataset, 0, 0, 0)
    with pytest.raises(UsageError):
        batch(dataset, 0, -1, SIZE)
