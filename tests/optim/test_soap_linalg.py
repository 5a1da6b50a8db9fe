"""LAPACK on CPU where as many devices as cores use it at once."""

import os
import subprocess
import sys

import pytest

QR = """
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

OFFICIAL = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sa_jax.optim import soap
from sa_jax.optim.soap_shared import trailing_matrix

jax.config.update("jax_enable_x64", True)
mesh = Mesh(np.array(jax.devices()), "x")
g = np.random.default_rng(0).normal(size=(50, 8, 64, 64))

def updates(g, sharding):
    tx = soap(1.0, weight_decay=0, precondition_frequency=1, view=trailing_matrix)
    update, state = jax.jit(tx.update), tx.init(jnp.zeros(g.shape[1:]))
    state = jax.device_put(state, sharding)
    for gradient in g:
        u, state = update(jax.device_put(gradient, sharding), state)
        u = np.asarray(u)
    return u

everywhere = updates(g, NamedSharding(mesh, P()))
for layer in range(8):
    one = updates(g[:, layer], jax.devices()[0])
    np.testing.assert_allclose(everywhere[layer], one, rtol=0, atol=1e-8)
"""


@pytest.mark.parametrize("program", [QR, OFFICIAL], ids=["qr", "official"])
def test_devices_that_factorise_batches_at_once_do_not_wait_for_each_other(program):
    """jaxlib's batched LAPACK hung here: its tasks waited for the threads that waited for them."""
    flags = f"--xla_force_host_platform_device_count={len(os.sched_getaffinity(0))}"
    environment = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
