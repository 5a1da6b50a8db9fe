"""Checkpoints: bit-for-bit, on any mesh, never a wrong byte, never a lost run."""

import json
import logging
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.errors import UserError
from sa_jax.training import checkpoints, digests, state_io
from sa_jax.training.checkpoints import RunCheckpointer
from tests.training.states import (
    State,
    abstract_state,
    as_bytes,
    flip,
    make_state,
    mesh_of,
    train_step,
)


@pytest.fixture(scope="module")
def step_fn():
    return jax.jit(train_step, donate_argnums=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, step_fn):
    """A folder with steps 1, 2, 3 and the bytes of each state; see `copy` to damage it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    state, states = make_state(mesh_of(4, 2)), {}
    with RunCheckpointer(folder, interval=1) as checkpointer:
        for step in (1, 2, 3):
            state = step_fn(state)
            states[step] = as_bytes(state)
            assert checkpointer.save(step, state)
    return folder, states


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


# --- saving and restoring ---


def load(folder, step, mesh):
    return state_io.load(folder / checkpoints.step_name(step), abstract_state(mesh))


def test_restored_state_is_bit_for_bit_the_saved_one(saved):
    folder, states = saved
    mesh = mesh_of(4, 2)
    checkpointer = RunCheckpointer(folder)
    assert checkpointer.all_steps() == [1, 2, 3]
    for step, state in (
        checkpointer.restore(abstract_state(mesh)),
        (1, load(folder, 1, mesh)),
        (2, load(folder, 2, mesh)),
    ):
        assert isinstance(state, State) and int(state.step) == step
        assert jax.tree.structure(state) == jax.tree.structure(abstract_state(mesh))
        assert as_bytes(state) == states[step]
        for x, target in zip(
            jax.tree.leaves(state), jax.tree.leaves(abstract_state(mesh)), strict=True
        ):
            assert x.dtype == target.dtype and x.sharding.is_equivalent_to(target.sharding, x.ndim)


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 2), (1, 1)])
def test_restored_on_another_mesh_the_values_are_equal(saved, shape):
    folder, states = saved
    mesh = mesh_of(*shape)
    step, state = RunCheckpointer(folder).restore(abstract_state(mesh))
    assert step == 3 and as_bytes(state) == states[3]
    kernel = state.params["layers"]["kernel"]
    assert kernel.sharding.mesh.shape == {"fsdp": shape[0], "tensor": shape[1]}
    assert kernel.addressable_shards[0].data.shape == (3, 64 // shape[0], 32 // shape[1])


def test_resumed_run_equals_the_uninterrupted_one(saved, step_fn):
    folder, states = saved
    state = load(folder, 1, mesh_of(4, 2))
    for step in (2, 3):
        state = step_fn(state)
        assert as_bytes(state) == states[step]


def test_donated_buffers_do_not_reach_a_save_under_way(tmp_path):
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    x = jnp.ones((1024, 1024))
    with RunCheckpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(0, {"x": x})
        for _ in range(5):
            x = double(x)
        x.block_until_ready()
    target = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
    _, state = RunCheckpointer(tmp_path / "c").restore(target)
    assert float(state["x"].min()) == float(state["x"].max()) == 1.0


def test_a_key_that_an_older_version_stored_as_numbers_is_refused(tmp_path):
    key = jax.random.key(7)
    with RunCheckpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, {"key": jax.random.key_data(key)})
    wanted = {"key": jax.ShapeDtypeStruct((), key.dtype, sharding=key.sharding)}
    with pytest.raises(UserError, match=r"key is uint32, not key<fry>: another version"):
        state_io.load(tmp_path / "c/step_000001", wanted)


def test_save_returns_before_the_digests_and_wait_after(tmp_path):
    state = {"x": jnp.ones((2048, 2048))}
    checkpointer = RunCheckpointer(tmp_path / "c")
    begin = time.monotonic()
    checkpointer.save(5, state)
    blocked = time.monotonic() - begin
    assert checkpointer.all_steps() == []
    checkpointer.wait()
    assert checkpointer.all_steps() == [5]
    assert blocked < time.monotonic() - begin
    assert (tmp_path / "c" / "step_000005" / "digests.json").is_file()


def test_saving_a_step_again_changes_nothing(copy, step_fn):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in copy.rglob("*") if p.is_file()}
    with RunCheckpointer(copy) as checkpointer:
        assert not checkpointer.save(3, make_state(mesh_of(4, 2)))
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in copy.rglob("*") if p.is_file()}
    assert after == before


def test_when_to_save_and_what_to_keep(tmp_path):
    with RunCheckpointer(tmp_path / "c", steps=(0, 3), interval=2, keep_interval=2) as checkpointer:
        assert [s for s in range(9) if checkpointer.should_save(s)] == [0, 2, 3, 4, 6, 8]
        for step in (0, 2, 3, 4, 6, 8):
            checkpointer.save(step, {"x": jnp.full((4,), step)})
    # The listed steps stay; of the others, the two newest.
    assert checkpoints.saved_steps(tmp_path / "c") == [0, 3, 6, 8]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "step_000000",
        "step_000003",
        "step_000006",
        "step_000008",
    ]
    assert not any(RunCheckpointer(tmp_path / "c").should_save(s) for s in range(9))


def test_weights_alone_load_on_another_mesh_and_in_another_dtype(saved):
    folder, states = saved
    mesh = mesh_of(2, 1)
    params = abstract_state(mesh).params
    loaded = checkpoints.load_subtree(folder, 3, "params", params)
    state = load(folder, 3, mesh)
    assert as_bytes(loaded) == as_bytes(state.params)
    kernel = params["layers"]["kernel"]
    half = jax.ShapeDtypeStruct(kernel.shape, jnp.bfloat16, sharding=kernel.sharding)
    loaded = checkpoints.load_subtree(folder, 2, "params/layers", {"kernel": half})
    state = load(folder, 2, mesh)
    assert as_bytes(loaded) == as_bytes(state.params["layers"]["kernel"].astype(jnp.bfloat16))
    with pytest.raises(UserError, match=r"params/other is absent in the checkpoint"):
        checkpoints.load_subtree(folder, 3, "params", {"other": half})


def test_a_state_that_does_not_fit_is_refused_by_name(saved):
    folder, _ = saved
    target = abstract_state(mesh_of(1, 1))
    scale = target.params["scale"]

    def with_scale(new: jax.ShapeDtypeStruct | None) -> State:
        params = {k: v for k, v in target.params.items() if k != "scale"}
        return target._replace(params=params if new is None else {**params, "scale": new})

    shape = jax.ShapeDtypeStruct((8,), scale.dtype, sharding=scale.sharding)
    dtype = jax.ShapeDtypeStruct(scale.shape, jnp.bfloat16, sharding=scale.sharding)
    for state, here in (
        (with_scale(shape), "float32 [8]"),
        (with_scale(dtype), "bfloat16 [7]"),
        (with_scale(None), "absent"),
    ):
        message = f"params/scale is float32 [7] in the checkpoint, {here} here"
        with pytest.raises(UserError, match=re.escape(message)):
            RunCheckpointer(folder).restore(state)


def test_no_checkpoint_is_none_or_an_error(tmp_path):
    target = abstract_state(mesh_of(1, 1))
    checkpointer = RunCheckpointer(tmp_path / "none")
    assert checkpointer.latest_step() is None and checkpointer.restore(target) is None
    with pytest.raises(UserError, match="no checkpoint of step 7; there are none"):
        checkpoints.load_subtree(tmp_path / "none", 7, "params", target.params)


# --- corruption ---


def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(copy):
    folder = copy / "step_000003"
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    data = [p for p in files if "/d/" in str(p)]
    assert len(files) >= 8 and data
    random = np.random.default_rng(0)
    tries = [(p, int(random.integers(p.stat().st_size)), int(random.integers(8))) for p in files]
    # Array data is what Orbax does not check: many more tries there.
    tries += [
        (p, int(random.integers(p.stat().st_size)), int(random.integers(8)))
        for p in data
        for _ in range(40)
    ]
    assert digests.find_corruption(folder, 3) is None
    for path, position, bit in tries:
        original = path.read_bytes()
        flip(path, position, bit)
        problem = digests.find_corruption(folder, 3)
        # A flip inside the white space of the JSON text changes no digest.
        harmless = path.name == "digests.json" and problem is None
        if harmless:
            assert json.loads(path.read_text()) == json.loads(original)
        else:
            assert problem is not None and str(path) in problem, (path, position, bit)
        path.write_bytes(original)
    assert digests.find_corruption(folder, 3) is None


def test_a_corrupt_newest_checkpoint_falls_back(copy, saved, warnings, step_fn):
    largest = max((copy / "step_000003").rglob("*"), key=lambda p: p.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    checkpointer = RunCheckpointer(copy)
    target = abstract_state(mesh_of(4, 2))
    step, state = checkpointer.restore(target)
    assert step == 2 and as_bytes(state) == saved[1][2]
    assert len(warnings) == 1 and str(largest) in warnings[0] and "step 3" in warnings[0]
    assert checkpointer.latest_step() == 2
    with pytest.raises(UserError, match="step 3 is corrupt.*its bytes are not those saved"):
        checkpoints.load_subtree(copy, 3, "params", target.params)
    # Going on from step 2, the run writes a good step 3 in its place.
    assert checkpointer.save(3, step_fn(state), wait=True)
    step, state = RunCheckpointer(copy).restore(target)
    assert step == 3 and as_bytes(state) == saved[1][3]


def test_without_verification_the_same_flip_loads(copy, saved):
    """What the digests are for: Orbax alone hands out the wrong value."""
    files = [p for p in (copy / "step_000003" / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    target = abstract_state(mesh_of(4, 2))
    original, silent = largest.read_bytes(), 0
    for position in np.linspace(0, len(original) - 1, 30).astype(int)[5:25]:
        flip(largest, int(position))
        try:
            _, state = RunCheckpointer(copy, verify=False).restore(target)
            silent += as_bytes(state) != saved[1][3]
        except UserError:
            pass
        largest.write_bytes(original)
    assert silent > 0


@pytest.mark.parametrize("damage", ["lost file", "cut off", "garbled manifest"])
def test_other_damage_falls_back(copy, warnings, damage):
    folder = copy / "step_000003"
    largest = max(folder.rglob("*"), key=lambda p: p.stat().st_size)
    if damage == "lost file":
        largest.unlink()
    elif damage == "cut off":
        largest.write_bytes(largest.read_bytes()[:-1])
    else:
        largest = folder / "digests.json"
        largest.write_text(largest.read_text()[:50])
    step, _ = RunCheckpointer(copy).restore(abstract_state(mesh_of(4, 2)))
    assert step == 2 and str(largest) in warnings[0]
    reason = {"lost file": "No such file", "cut off": "it has ", "garbled manifest": "trusted"}
    assert reason[damage] in warnings[0]


def test_a_checkpoint_without_digests_counts_as_incomplete(copy, warnings):
    (copy / "step_000003" / "digests.json").unlink()
    checkpointer = RunCheckpointer(copy)
    assert checkpointer.all_steps() == [1, 2]
    step, _ = checkpointer.restore(abstract_state(mesh_of(4, 2)))
    assert step == 2
    assert len(warnings) == 1 and "step_000003 has no digests.json" in warnings[0]


def test_all_corrupt_is_an_error_not_a_fresh_start(copy):
    for folder in copy.iterdir():
        flip(folder / "state" / "manifest.ocdbt", 20)
    with pytest.raises(UserError, match=r"every checkpoint \(steps 1, 2, 3\) is corrupt"):
        RunCheckpointer(copy).restore(abstract_state(mesh_of(4, 2)))


def test_a_save_may_take_a_day_and_so_may_waiting_for_the_slowest_process():
    assert state_io._context().async_options.timeout_secs >= 24 * 3600
    assert state_io.orbax_multihost.coordination_timeout() >= 24 * 3600


@pytest.mark.parametrize(
    ("path", "level", "error", "is_kept"),
    [
        ("/x/orbax/y.py", "INFO", None, False),
        ("/x/orbax/y.py", "WARNING", None, True),
        ("/x/orbax/y.py", "ERROR", ValueError("write: No space left on device"), False),
        ("/x/orbax/y.py", "ERROR", ValueError("write: Input/output error"), True),
        ("/x/sa_jax/y.py", "ERROR", OSError(28, "No space left on device"), True),
    ],
)
def test_of_orbax_only_chatter_and_the_tracebacks_of_a_full_disk_are_dropped(
    path, level, error, is_kept
):
    raised = (type(error), error, None) if error else None
    levelno = logging.getLevelNamesMapping()[level]
    record = logging.LogRecord("absl", levelno, path, 1, "", (), raised)
    assert state_io._is_wanted(record) == is_kept
