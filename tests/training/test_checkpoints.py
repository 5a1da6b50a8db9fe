"""Checkpoints: bit-for-bit, on any mesh, never a wrong byte, never a lost run."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sa_jax.errors import UserError
from sa_jax.training import checkpoints, digests
from sa_jax.training.checkpoints import RunCheckpointer
from sa_jax.training.step import TrainState
from tests.cpu import xla_flags

P = PartitionSpec


class State(NamedTuple):
    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
SPECS = {"layers": {"kernel": P(None, "fsdp", "tensor")}, "scale": P(), "half": P("fsdp")}


def mesh_of(fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def init(seed: jax.Array) -> State:
    params = {
        "layers": {"kernel": jax.random.normal(jax.random.key(seed), (3, 64, 32))},
        "scale": jnp.linspace(-1.0, 1.0, 7),
        "half": jnp.arange(64, dtype=jnp.bfloat16) / 7,
    }
    return State(jnp.int32(0), params, OPTIMIZER.init(params), jax.random.key(seed + 1))


def abstract_state(mesh: jax.sharding.Mesh) -> State:
    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(
            (
                spec
                for key, spec in (("kernel", SPECS["layers"]["kernel"]), ("half", P("fsdp")))
                if name.endswith(key)
            ),
            P(),
        )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def make_state(mesh: jax.sharding.Mesh, seed: int = 0) -> State:
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(mesh))
    return jax.jit(init, out_shardings=shardings)(seed)


def train_step(state: State) -> State:
    def loss(params):
        noise = jax.random.normal(state.key, (64,))
        return sum((x.astype(jnp.float32) ** 2).sum() for x in jax.tree.leaves(params)) + (
            params["half"].astype(jnp.float32) @ noise
        )

    grads = jax.grad(loss)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    key = jax.random.split(state.key)[0]
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state, key)


@pytest.fixture(scope="module")
def step_fn():
    return jax.jit(train_step, donate_argnums=0)


def as_bytes(tree: Any) -> list[bytes]:
    def raw(x: jax.Array) -> bytes:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).tobytes()

    return [raw(x) for x in jax.tree.leaves(tree)]


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


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)


# --- saving and restoring ---


def test_restored_state_is_bit_for_bit_the_saved_one(saved):
    folder, states = saved
    mesh = mesh_of(4, 2)
    checkpointer = RunCheckpointer(folder)
    assert checkpointer.all_steps() == [1, 2, 3]
    for wanted in (None, 1, 2):
        step, state = checkpointer.restore(abstract_state(mesh), wanted)
        assert step == (wanted or 3)
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
    _, state = RunCheckpointer(folder).restore(abstract_state(mesh_of(4, 2)), 1)
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
    with RunCheckpointer(tmp_path / "c", steps=(0, 3), interval=2, keep=2) as checkpointer:
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
    step, loaded = checkpoints.load_subtree(folder, None, "params", params)
    _, state = RunCheckpointer(folder).restore(abstract_state(mesh), 3)
    assert step == 3 and as_bytes(loaded) == as_bytes(state.params)
    kernel = params["layers"]["kernel"]
    half = jax.ShapeDtypeStruct(kernel.shape, jnp.bfloat16, sharding=kernel.sharding)
    _, loaded = checkpoints.load_subtree(folder, 2, "params/layers", {"kernel": half})
    _, state = RunCheckpointer(folder).restore(abstract_state(mesh), 2)
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
        checkpointer.restore(target, 7)


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
        checkpointer.restore(target, 3)
    with pytest.raises(UserError, match="step 3 is corrupt"):
        checkpoints.load_subtree(copy, None, "params", target.params)
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
            _, state = RunCheckpointer(copy, verify=False).restore(target, 3)
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


# --- kills, full disks, several processes: real processes ---

SAVER = """
    import sys, jax, jax.numpy as jnp
    from sa_jax.training.checkpoints import RunCheckpointer
    state = {"x": jnp.zeros((600, 1000))}
    with RunCheckpointer(sys.argv[1], interval=1, keep=2) as checkpointer:
        first = checkpointer.latest_step() or 0
        for step in range(first + 1, 10**6):
            state = {"x": jnp.full((600, 1000), step, jnp.float32)}
            checkpointer.save(step, state)
            print(step, flush=True)
"""


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def end_processes():
    yield
    while STARTED:
        STARTED.pop().kill()


def start(script: str, *arguments: object, wrap: tuple[str, ...] = (), **environment: str):
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": xla_flags(1), **environment}
    command = [*wrap, sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    STARTED.append(process)
    return process


def test_killed_while_saving_the_last_complete_checkpoint_loads(tmp_path):
    folder = tmp_path / "c"
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {"x": jax.ShapeDtypeStruct((600, 1000), jnp.float32, sharding=device)}
    last = 0
    for delay in (0.0, 0.03, 0.15):
        process = start(SAVER, folder)
        lines = []
        while len(lines) < 3:  # each line says that the save before it is complete
            lines.append(process.stdout.readline())
            assert lines[-1].strip().isdigit(), lines[-1] + process.stdout.read()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        printed = int((lines + rest)[-1])
        step, state = RunCheckpointer(folder).restore(target)
        assert printed - 1 <= step <= printed + 1 and step > last
        assert np.array_equal(state["x"], np.full((600, 1000), step, np.float32))
        last = step
    # The next run's first save clears what the kills left.
    with RunCheckpointer(folder) as checkpointer:
        checkpointer.save(last + 1, state)
    assert not [p for p in folder.iterdir() if "tmp" in p.name]


FULL_DISK = """
    import sys, subprocess, jax, jax.numpy as jnp
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", sys.argv[1]], check=True)
    from sa_jax.errors import UserError
    from sa_jax.training.checkpoints import RunCheckpointer
    folder = sys.argv[1] + "/checkpoints"
    key = jax.random.key(0)
    state = {"x": jax.random.normal(key, (700, 1000))}  # 2.8 MB, does not compress: 2 fit
    checkpointer = RunCheckpointer(folder)
    for step in (1, 2, 3):
        try:
            checkpointer.save(step, {"x": state["x"] + step}, wait=True)
        except UserError as error:
            print("failed", step, error)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {"x": jax.ShapeDtypeStruct((700, 1000), jnp.float32, sharding=device)}
    step, restored = RunCheckpointer(folder).restore(target)
    print("restored", step, bool((restored["x"] == state["x"] + step).all()))
    import os
    print("left", sorted(os.listdir(folder)))
"""


def test_full_disk_names_the_disk_and_the_last_good_checkpoint_loads(tmp_path):
    """A real 6 MB file system, in a mount name space of its own."""
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    wrap = ("unshare", "--mount", *user)
    if not shutil.which("unshare") or subprocess.run([*wrap, "true"]).returncode:
        pytest.skip("needs a mount name space (root, or user name spaces) for a small disk")
    output = start(FULL_DISK, tmp_path, wrap=wrap).communicate(timeout=120)[0]
    failure = re.search(r"^failed (\d) (.*)$", output, re.M)
    assert failure, output
    step, message = int(failure[1]), failure[2]
    assert "the disk is full" in message and f"free on {tmp_path}" in message
    assert f"saving the checkpoint of step {step}" in message
    assert f"last good checkpoint: step {step - 1}" in message
    assert f"restored {step - 1} True" in output, output
    assert f"left {[f'step_{s:06d}' for s in range(1, step)]}" in output, output


TWO_PROCESSES = """
    import json, os, signal, sys, time
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
    import jax.numpy as jnp, numpy as np
    from absl import logging
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from sa_jax.training.checkpoints import RunCheckpointer
    from sa_jax.training.preemption import PreemptionGuard

    index = jax.process_index()
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    shardings = {"x": NamedSharding(mesh, P("fsdp")), "y": NamedSharding(mesh, P()),
                 "key": NamedSharding(mesh, P())}
    make = jax.jit(lambda i: {"x": jnp.arange(4096.0) + i, "y": jnp.float32(i),
                              "key": jax.random.key(i)}, out_shardings=shardings)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                          jax.eval_shape(make, 0), shardings)

    def same(state, i):
        wanted = np.arange(4096.0) + i
        return bool(all((s.data == wanted[s.index]).all() for s in state["x"].addressable_shards)
                    and float(state["y"]) == i
                    and (jax.random.key_data(state["key"])
                         == jax.random.key_data(make(i)["key"])).all())

    warnings = []
    logging.warning = lambda text, *a: warnings.append(text % a)
    with PreemptionGuard() as guard, RunCheckpointer(sys.argv[1], keep=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make(step))
        checkpointer.wait()
        steps = checkpointer.all_steps()
        restored = checkpointer.restore(target)
        # Wait until both have looked before one of them damages a file that process 1 wrote.
        jax.experimental.multihost_utils.sync_global_devices("restored")
        if index == 0:
            folder = f"{sys.argv[1]}/step_000003/state/ocdbt.process_1/d"
            path = f"{folder}/{sorted(os.listdir(folder))[0]}"
            data = bytearray(open(path, "rb").read())
            data[len(data) // 2] ^= 1
            open(path, "wb").write(data)
        jax.experimental.multihost_utils.sync_global_devices("damaged")
        fallen = checkpointer.restore(target)
        began, calls, stop = time.monotonic(), 0, None
        while time.monotonic() - began < 15:
            calls += 1
            if guard.should_stop(7):  # the step stands still, as in an evaluation
                stop = calls
                break
            if index == 1 and calls == 5:
                os.kill(os.getpid(), signal.SIGINT if sys.argv[4] == "SIGINT" else signal.SIGTERM)
            time.sleep(0.01 + 0.01 * index)
        checkpointer.save(4, make(4), wait=True)
    print("RESULT " + json.dumps({
        "steps": steps, "restored": restored[0], "same": same(restored[1], 3),
        "fallen": fallen[0], "fallen_same": same(fallen[1], 2), "warnings": warnings,
        "stop": stop, "end": RunCheckpointer(sys.argv[1]).all_steps()}), flush=True)
"""


def test_another_processs_unfinished_digests_are_not_data(tmp_path):
    with RunCheckpointer(tmp_path) as saver:
        saver.save(1, make_state(mesh_of(4, 2)), wait=True)
        folder = tmp_path / "step_000001"
        (folder / "digests.json").unlink()
        for name in (".digests.part_00001.json.77.tmp", "digests.part_00001.json"):
            (folder / name).write_text("{}")  # as process 1 has it when it comes first
        digests.write_digests(folder, 1, barrier=lambda name: None)
        for name in (".digests.part_00001.json.77.tmp", "digests.part_00001.json"):
            (folder / name).unlink()
        assert digests.find_corruption(folder, 1) is None


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_two_processes_save_restore_fall_back_and_stop_together(tmp_path, signal_name):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "c"
    processes = [
        start(TWO_PROCESSES, folder, port, i, signal_name, XLA_FLAGS=xla_flags(2)) for i in (0, 1)
    ]
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
    results = [json.loads(re.search(r"^RESULT (.*)$", out, re.M)[1]) for out in outputs]
    for result in results:
        assert result["steps"] == [2, 3] and result["restored"] == 3 and result["same"]
        assert result["fallen"] == 2 and result["fallen_same"]
        assert "step_000003/state/ocdbt.process_1/d/" in result["warnings"][0]
        assert result["end"] == [2, 3, 4]  # the corrupt one stays until its step is saved again
    # Only process 1 was signalled; both stop, at the same call.
    assert results[0]["stop"] == results[1]["stop"] is not None
    manifest = json.loads((folder / "step_000002" / "digests.json").read_text())
    writers = {digests.writer(name) for name in manifest["files"]}
    assert writers == {0, 1} and manifest["processes"] == 2
    # One process reads what two wrote.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=device)
    _, loaded = checkpoints.load_subtree(folder, 4, "x", x)
    assert np.array_equal(loaded, np.arange(4096.0) + 4)


def tree(value: float) -> TrainState:
    """A state of 5 parameters with two moments, all of one value."""
    leaf = jnp.full(5, value, jnp.float32)
    return TrainState(jnp.int32(value), {"w": leaf}, {"mu": leaf, "nu": leaf})


def abstract_tree() -> TrainState:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree(0))


def save_all(folder, **arguments) -> list[int]:
    """Saves steps 0 to 10 as the loop does; returns the steps it saved at."""
    saved = []
    with RunCheckpointer(folder, **arguments) as checkpointer:
        for step in range(11):
            if checkpointer.should_save(step):
                checkpointer.save(step, tree(step + 1 / 3))
                saved.append(step)
    return saved


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("listed, dtype", [("weights", "float32"), ("weights_bf16", "bfloat16")])
def test_listed_steps_can_be_weights_alone(tmp_path, listed, dtype):
    schedule = {"steps": (1, 4, 7), "interval": 4, "keep": 1, "listed": listed, "last": 10}
    assert save_all(tmp_path, **schedule) == [1, 4, 7, 8, 10]
    assert names(tmp_path) == ["step_000010", *(f"weights_{step:06d}" for step in (1, 4, 7))]
    assert checkpoints.saved_steps(tmp_path) == [1, 4, 7, 10]
    # A run goes on from the newest full state, children start from any.
    step, state = RunCheckpointer(tmp_path, **schedule).restore(abstract_tree())
    assert step == 10 and np.all(state.opt_state["nu"] == np.float32(10 + 1 / 3))
    _, params = checkpoints.load_subtree(tmp_path, 4, "params", abstract_tree().params)
    expected = np.float32(jnp.asarray(4 + 1 / 3, dtype))
    assert params["w"].dtype == np.float32 and np.all(params["w"] == expected)
    # Weights are digested too.
    data = max((tmp_path / "weights_000004").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(data, data.stat().st_size // 2)
    with pytest.raises(UserError, match="step 4 is corrupt: .*its bytes are not those saved"):
        checkpoints.load_subtree(tmp_path, 4, "params", abstract_tree().params)
    with pytest.raises(UserError, match="no checkpoint of step 5; there are steps 1, 4, 7, 10"):
        checkpoints.load_subtree(tmp_path, 5, "params", abstract_tree().params)


def test_a_listed_full_state_stays_where_a_resume_lists_weights(tmp_path):
    save_all(tmp_path, steps=(1,), listed="full", last=1)
    with RunCheckpointer(
        tmp_path, steps=(1, 4), listed="weights", interval=2, keep=1
    ) as checkpointer:
        for step in (2, 4, 6):
            checkpointer.save(step, tree(step))
    assert names(tmp_path) == ["step_000001", "step_000006", "weights_000004"]


def test_a_stopped_run_saves_its_full_state_at_a_step_of_weights(tmp_path):
    arguments = {"steps": (2,), "listed": "weights", "last": 9, "keep": 1}
    with RunCheckpointer(tmp_path, **arguments) as checkpointer:
        assert checkpointer.save(2, tree(2))
        checkpointer.wait()
        assert names(tmp_path) == ["weights_000002"]
        assert checkpointer.save(2, tree(2), wait=True)
        assert not checkpointer.save(2, tree(2), wait=True)
    assert names(tmp_path) == ["step_000002", "weights_000002"]
    assert RunCheckpointer(tmp_path, **arguments).restore(abstract_tree())[0] == 2
