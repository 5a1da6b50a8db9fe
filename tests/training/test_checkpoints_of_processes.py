"""Checkpoints of real processes: killed, on a full disk, and of several at once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.training import checkpoints, digests
from sa_jax.training.checkpoints import RunCheckpointer
from tests.cpu import xla_flags
from tests.training.states import make_state, mesh_of
from tests.zygote import ROOT, free_port

SAVER = """
    import sys, jax, jax.numpy as jnp
    from sa_jax.training.checkpoints import RunCheckpointer
    state = {"x": jnp.zeros((600, 1000))}
    with RunCheckpointer(sys.argv[1], interval=1, keep_interval=2) as checkpointer:
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
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(1), **environment}
    command = [*wrap, sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    STARTED.append(process)
    return process


def test_killed_while_saving_the_last_complete_checkpoint_loads(tmp_path):
    """The last whole checkpoint loads after a kill while the next was written."""
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
    """A full disk is named, and the last good checkpoint loads.

    A real 6 MB file system, in a mount name space of its own.
    """
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    wrap = ("unshare", "--mount", *user)
    if not shutil.which("unshare") or subprocess.run([*wrap, "true"]).returncode:
        pytest.skip("needs a mount name space (root, or user name spaces) for a small disk")
    output = start(FULL_DISK, tmp_path, wrap=wrap).communicate(timeout=120)[0]
    failure = re.search(r"^failed (\d) (.*)$", output, re.M)
    assert failure, output
    # One line for the failure, and no traceback of Orbax's threads before it.
    assert [line.split()[0] for line in output.splitlines()] == ["failed", "restored", "left"]
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
    from sa_jax.errors import UserError
    from sa_jax.training import digests
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
    with PreemptionGuard() as guard, RunCheckpointer(sys.argv[1], keep_interval=2) as checkpointer:
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
        # Process 1 alone cannot read the digests of step 2: process 0 must reject it too.
        parse = digests.parse_json
        def unreadable(text):
            if index == 1 and '"step": 2' in text:
                raise OSError("stale file handle")
            return parse(text)
        digests.parse_json = unreadable
        try:
            refused = str(RunCheckpointer(sys.argv[1]).restore(target))
        except UserError as error:
            refused = str(error)
        digests.parse_json = parse
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
        "refused": refused,
        "stop": stop, "end": RunCheckpointer(sys.argv[1]).all_steps()}), flush=True)
"""


def test_another_processs_unfinished_digests_are_not_data(tmp_path):
    """Digests that another process has not finished are not read as data."""
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


@pytest.mark.parametrize("signal_name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.long)])
def test_two_processes_save_restore_fall_back_and_stop_together(tmp_path, signal_name):
    """Two processes save, restore, pass over a damaged checkpoint and stop together."""
    folder, port = tmp_path / "c", free_port()
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
        assert "every checkpoint (steps 2, 3) is corrupt" in result["refused"]
        assert result["end"] == [2, 3, 4]  # the corrupt one stays until its step is saved again
    # Only process 1 was signalled; both stop, at the same call.
    assert results[0]["stop"] == results[1]["stop"] is not None
    manifest = json.loads((folder / "step_000002" / "digests.json").read_text())
    writers = {digests.writer(name) for name in manifest["files"]}
    assert writers == {0, 1} and manifest["processes"] == 2
    # One process reads what two wrote.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=device)
    loaded = checkpoints.load_subtree(folder, 4, "x", x)
    assert np.array_equal(loaded, np.arange(4096.0) + 4)


LATE = """
    import os, sys, time
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
    import jax.numpy as jnp
    from orbax.checkpoint._src.path import async_path
    from orbax.checkpoint.experimental.v1._src.synchronization import multihost
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from sa_jax.training import digests, run_record
    from sa_jax.training.checkpoints import RunCheckpointer

    multihost._DEFAULT_BARRIER_TIMEOUT = 10  # of 300 s
    index = jax.process_index()
    run, folder = sys.argv[1] + f"/{index}", sys.argv[1] + "/checkpoints"
    # Process 1 does not see yet what process 0 has written.
    run_id = run_record.open_run(run, {"config": {}})["run_id"]
    if index == 1:
        run_record.check_present(run)
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
    state = jax.jit(jnp.ones, static_argnums=0, out_shardings=NamedSharding(mesh, P("fsdp")))(64)
    with RunCheckpointer(folder) as checkpointer:
        checkpointer.save(1, {"x": state}, wait=True)
        if index == 0:
            os.unlink(folder + "/step_000001/digests.json")  # as a kill leaves it
        jax.experimental.multihost_utils.sync_global_devices("left")
        exists, files, seen = async_path.exists, digests._data_files, []
        async def late(path):  # process 0 may have removed the folder meanwhile
            time.sleep(index)
            return await exists(path)
        def late_files(path):
            seen.append(path)
            if index == 1 and len(seen) == 1:
                raise FileNotFoundError(path)
            return files(path)
        async_path.exists, digests._data_files = late, late_files
        checkpointer.save(1, {"x": state}, wait=True)
    print("RESULT", run_id, checkpointer.all_steps(), flush=True)
"""


def test_a_file_system_shows_a_process_late_what_process_0_did(tmp_path):
    """A shared file system may show another process late what process 0 did: nothing is lost"""
    port = free_port()
    processes = [start(LATE, tmp_path, port, i) for i in (0, 1)]
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    results = [re.findall(r"^RESULT (.*)$", out, re.M) for out in outputs]
    assert len(results[0]) == 1 and results[0] == results[1], "\n".join(outputs)
    assert results[0][0].endswith(" [1]")
