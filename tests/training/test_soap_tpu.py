"""The 8B training step with the fast SOAP, compiled for 16 TPU v5p chips without having one."""

import os
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.model import Llama
from sa_jax.optim import make_optimizer, make_schedule
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.rules import BATCH_SPEC, with_shardings
from sa_jax.training.config import default_config
from sa_jax.training.start import abstract_params
from sa_jax.training.step import init_state, make_train_step, state_shardings

pytestmark = pytest.mark.long

HBM = 95 * 2**30  # bytes of a v5p chip
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
)
ROWS, LENGTH, ACCUMULATION = 32, 4096, 2  # 131k tokens a step


def test_the_8b_step_compiles_and_fits(capsys, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")  # ask no metadata server
    monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc("v5p:2x2x4", "tpu").devices
    mesh = make_mesh(1, 8, 2, devices=devices)
    config = default_config().optimizer
    config.name = "soap"
    model = Llama(LLAMA_8B, dtype=jnp.bfloat16, remat="full", mesh=mesh)
    tx, schedule = make_optimizer(config, 1000, mesh), make_schedule(config, 1000)
    state = jax.eval_shape(lambda p: init_state(p, tx), abstract_params(model))
    placed = state_shardings(mesh, state)
    rows = NamedSharding(mesh, BATCH_SPEC)
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=rows)
        for name, dtype in (
            ("tokens", jnp.int32),
            ("targets", jnp.int32),
            ("loss_mask", jnp.bool_),
            ("positions", jnp.int32),
            ("segment_ids", jnp.int32),
        )
    }
    step = jax.jit(
        make_train_step(model, tx, schedule, ACCUMULATION),
        donate_argnums=0,
        out_shardings=(placed, None),
    )
    lowered = step.lower(with_shardings(state, placed), {}, batch)
    begin = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    seconds = time.perf_counter() - begin
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    with capsys.disabled():
        print(
            f"\n8B with fast SOAP for v5p:2x2x4: compiled in {seconds:.0f} s; "
            f"{memory.argument_size_in_bytes / 2**30:.1f} GiB of arguments and "
            f"{memory.temp_size_in_bytes / 2**30:.1f} GiB of temporaries on a chip of 95"
        )
    assert total < 0.95 * HBM
