"""The table of the state's size, for the study's models."""

import jax
import numpy as np
import pytest

from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.model import Llama
from sa_jax.optim.build import llama_view
from sa_jax.optim.soap import soap
from sa_jax.optim.soap_plan import soap_plan
from tests.toys import CONFIG

SIZES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_layers": 80, "num_heads": 64},
}


def abstract_params(config):
    tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
    return jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]


@pytest.fixture(scope="module")
def models():
    shared = {"vocab_size": 128256, "num_kv_heads": 8, "head_dim": 128}
    return {name: abstract_params(LlamaConfig(**shared, **size)) for name, size in SIZES.items()}


def totals(rows):
    names = ("moment_bytes", "basis_bytes", "step_flops", "refresh_flops")
    return {name: sum(getattr(row, name) for row in rows) for name in names}


# Settings, and GB of factors and bases in float32 counted by hand from the published shapes.
ALL_WHOLE = ({"block_size": 65536}, {"8b": 197, "70b": 1967})
D_ALONE = ({"block_size": 16384, "max_precond_dim": 8192}, {"8b": 39.5, "70b": 389})
D_WHOLE = ({"block_above": 8192}, {"8b": 62, "70b": 502})
ALL_BLOCKS = ({}, {"8b": 42.5, "70b": 211})


@pytest.mark.parametrize("settings, want", [ALL_WHOLE, D_ALONE, D_WHOLE, ALL_BLOCKS])
@pytest.mark.parametrize("name", SIZES)
def test_state_of_the_studys_models(models, name, settings, want):
    settings = {"max_precond_dim": 65536} | settings
    sums = totals(soap_plan(models[name], view=llama_view, **settings))
    np.testing.assert_allclose(sums["basis_bytes"] / 1e9, want[name], rtol=0.05)
    weights = sum(leaf.size for leaf in jax.tree.leaves(models[name]))
    assert sums["moment_bytes"] == 8 * weights


def test_operations_of_the_8b_model_at_the_studys_batch(models):
    """As a share of the model's own, at 131k tokens a step: 3.2 % refreshing every 10 steps and
    5.2 % at every step, with a QR of 8/3 n³; ours takes 8 n³ in matrix products."""
    sums = totals(soap_plan(models["8b"], view=llama_view, max_precond_dim=65536))
    weights = sum(leaf.size for leaf in jax.tree.leaves(models["8b"]))
    model_flops = 6 * weights * 131072
    assert 0.025 < (sums["step_flops"] + sums["refresh_flops"] / 10) / model_flops < 0.04
    assert 0.05 < (sums["step_flops"] + sums["refresh_flops"]) / model_flops < 0.08


def test_the_table_is_the_states_size():
    """Row by row nothing is missing: the sum is what `init` makes."""
    params = abstract_params(CONFIG)
    settings = {"view": llama_view, "block_size": 16}
    state = jax.eval_shape(soap(1e-3, mode="fast", **settings).init, params)
    made = sum(4 * x.size for x in jax.tree.leaves((state.stacks, state.mu, state.nu)))
    rows = soap_plan(params, **settings)
    sums = totals(rows)
    assert sums["moment_bytes"] + sums["basis_bytes"] == made
    assert len(rows) == len(jax.tree.leaves(params))
    gate = next(row for row in rows if row.path == "layers/mlp/gate/kernel")
    assert (gate.matrices, gate.rows.blocks, gate.rows.block) == (3, 2, 16)
    assert (gate.cols.blocks, gate.cols.block) == (3, 16)
