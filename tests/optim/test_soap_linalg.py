"""QR on CPU where as many devices as cores take one at once."""

import os
import subprocess
import sys

PROGRAM = """
import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from sa_jax.optim.soap_linalg import orthonormal

mesh = Mesh(np.array(jax.devices()), "x")
y = np.random.default_rng(0).normal(size=(8 * mesh.size, 128, 128)).astype("f")
qr = jax.jit(jax.shard_map(orthonormal, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
for _ in range(100):
    q = np.asarray(qr(y))
np.testing.assert_allclose(q.mT @ q, np.broadcast_to(np.eye(128), q.shape), atol=1e-5)
r = q.mT @ y
np.testing.assert_allclose(np.tril(r, -1), 0, atol=1e-4)
"""


def test_devices_that_factorise_batches_at_once_do_not_wait_for_each_other():
    """jaxlib's batched QR hung here: its tasks waited for the threads that waited for them."""
    flags = f"--xla_force_host_platform_device_count={len(os.sched_getaffinity(0))}"
    environment = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
