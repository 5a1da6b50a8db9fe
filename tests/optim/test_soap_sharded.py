"""The fast mode on meshes of 8 fake devices: the same numbers as on one, and what it sends."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.optim import soap
from sa_jax.optim.build import decay_mask, llama_view
from sa_jax.optim.soap_layout import make_layout, state_specs
from sa_jax.optim.soap_shared import TensorView
from sa_jax.parallel.rules import partition_spec, shardings

AXES = ("data", "fsdp", "tensor")
SHAPES = {
    "embed": {"embedding": (32, 16)},
    "layers": {
        "attention": {"q": {"kernel": (3, 16, 16)}, "o": {"kernel": (3, 16, 16)}},
        "mlp": {"gate": {"kernel": (3, 16, 24)}, "down": {"kernel": (3, 24, 16)}},
        "mlp_norm": {"scale": (3, 16)},
    },
}
STEPS = 40


def path_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def specs():
    return jax.tree_util.tree_map_with_path(
        lambda path, shape: partition_spec(path_of(path), len(shape)),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def draw(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(sizes=None, kind=AxisType.Auto, dtype=jnp.float32):
    """Parameters after 40 steps on prescribed gradients, and the compiled text of a step."""
    mesh = None
    if sizes is not None:
        mesh = jax.make_mesh(sizes, AXES, axis_types=(kind,) * 3)
    tx = soap(
        3e-3,
        mode="fast",
        block_size=8,
        matmul_dtype=dtype,
        mask=decay_mask,
        view=llama_view,
        mesh=mesh,
        partition_spec=partition_spec,
    )

    def place(tree):
        if mesh is None:
            return tree
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs())
        return jax.device_put(tree, shardings)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    explicit = kind == AxisType.Explicit
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        params = place(draw(0))
        state = jax.jit(tx.init)(params)
        compiled = jax.jit(step).lower(params, state, params).compile()
        for number in range(1, STEPS + 1):
            params, state = compiled(params, state, place(draw(number)))
    assert int(state.rejected) == int(state.skipped) == 0
    return jax.device_get(params), state, compiled.as_text()


@pytest.fixture(scope="module")
def unsharded():
    return {dtype: run(dtype=dtype)[0] for dtype in (jnp.float32, jnp.bfloat16)}


def furthest(a, b):
    return max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def collectives(text):
    kinds = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    found = {kind: re.findall(rf"= (.*?) {kind}(?:-start)?\(", text) for kind in kinds}
    return {kind: shapes for kind, shapes in found.items() if shapes}


MESHES = [
    ((1, 8, 1), AxisType.Auto),
    ((1, 4, 2), AxisType.Auto),
    ((1, 4, 2), AxisType.Explicit),
    ((2, 4, 1), AxisType.Auto),
    ((2, 4, 1), AxisType.Explicit),
]


@pytest.mark.parametrize("sizes, kind", MESHES)
def test_sharded_is_unsharded_and_sends_what_was_designed(sizes, kind, unsharded, capfd):
    """One all-to-all in and one out for each stack and mesh axis that cuts its parameters; no
    factor ever travels. Over `data`, which cuts none, the updates alone are gathered."""
    params, state, text = run(sizes, kind)
    assert furthest(params, unsharded[jnp.float32]) <= 1e-5
    assert "rematerialization" not in capfd.readouterr().err

    stacks = state.stacks
    assert set(stacks) == {"1x16x32", "6x16x16", "6x16x24"}
    axes = sum(size > 1 for size in sizes[1:])
    sent = collectives(text)
    assert set(sent) <= {"all-to-all", "all-gather"}
    assert len(sent["all-to-all"]) == 2 * axes * len(stacks) - 2 * embedding_stays(sizes)
    assert len(sent.get("all-gather", [])) == (len(stacks) if sizes[0] > 1 else 0)


def embedding_stays(sizes):
    """The vocabulary stays cut over `tensor` at the owners, so that hop is none."""
    return sizes[2] > 1


@pytest.mark.parametrize(
    "block",
    [np.full((8, 8), np.nan), np.where(np.eye(8), 1, 3e38)],
    ids=["a factor that is not finite", "a new basis that is refused"],
)
def test_columns_that_are_cut_are_normalised_and_guarded_as_a_whole(block):
    """Two matrices on eight devices: the columns of each are cut over four. Of the second, one
    block, on one device, is spoilt: the whole matrix stands still, and counts once a step."""
    shapes = {
        "layers": {
            "attention": {"q": {"kernel": (1, 16, 64)}},
            "mlp": {"down": {"kernel": (1, 64, 16)}},
        }
    }
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}

    def train(mesh):
        tx = soap(
            3e-3,
            mode="fast",
            block_size=8,
            normalize_grads=True,
            matmul_dtype=jnp.float32,
            view=llama_view,
            mesh=mesh,
            partition_spec=partition_spec,
        )
        params = jax.tree.map(lambda shape: jnp.ones(shape), shapes, **is_shape)
        placed = None if mesh is None else shardings(mesh, params)
        params = params if mesh is None else jax.device_put(params, placed)
        state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
        for number in range(8):
            rng = np.random.default_rng(number)
            gradients = jax.tree.map(lambda p, r=rng: jnp.asarray(r.normal(size=p.shape)), params)
            updates, state = step(gradients, state, params)
            params = optax.apply_updates(params, updates)
            if number == 4:
                (stack,) = state.stacks.values()
                broken = stack.gg_cols.at[1, 3].set(block)
                broken = dataclasses.replace(stack, gg_cols=broken)
                state = state._replace(stacks={"2x16x64": broken})
        return params, state

    mesh = jax.make_mesh((1, 4, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    (want, alone), (got, state) = train(None), train(mesh)
    assert state.stacks["2x16x64"].split_axes == ("fsdp",)
    assert furthest(*jax.device_get((got, want))) <= 1e-5
    assert int(state.rejected) == int(alone.rejected) == 3
    np.testing.assert_allclose(
        state.stacks["2x16x64"].mu_ncr, alone.stacks["2x16x64"].mu_ncr, rtol=0, atol=1e-5
    )


def test_gradients_and_directions_are_sent_as_bfloat16():
    mesh = jax.make_mesh((1, 4, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    tx = soap(1e-3, mode="fast", view=llama_view, mesh=mesh, partition_spec=partition_spec)
    text = str(jax.make_jaxpr(tx.update)(draw(0), tx.init(draw(0)), draw(0)))
    sent = re.findall(r":(\w+)\[[^\]]*\] = all_to_all\[", text)
    assert sent and set(sent) == {"bf16"}


def test_bfloat16_operands_change_a_sharded_run_by_less_than_a_hundredth(unsharded):
    params, _, _ = run((1, 4, 2), dtype=jnp.bfloat16)
    moved = furthest(params, draw(0))
    assert furthest(params, unsharded[jnp.bfloat16]) <= 0.01 * moved
    # Operands are really rounded.
    assert furthest(params, unsharded[jnp.float32]) > 1e-3 * moved


def test_every_device_holds_its_share_of_moments_factors_and_bases():
    """6 matrices on 8 devices: the stack is filled up to 8, one each."""
    mesh = jax.make_mesh((1, 4, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    tx = soap(
        1e-3, mode="fast", view=llama_view, mesh=mesh, partition_spec=partition_spec, block_size=8
    )
    state = jax.jit(tx.init)(draw(0))
    stack = state.stacks["6x16x24"]
    assert stack.mu_ncr.shape == (8, 24, 16) and stack.gg_cols.shape == (8, 3, 8, 8)
    for x in (stack.mu_ncr, stack.nu_ncr, stack.gg_rows, stack.q_rows, stack.gg_cols, stack.q_cols):
        assert {shard.data.shape for shard in x.addressable_shards} == {(1, *x.shape[1:])}
    vocabulary = state.stacks["1x16x32"]
    assert {shard.data.shape for shard in vocabulary.nu_ncr.addressable_shards} == {(1, 4, 16)}
    assert vocabulary.gg_cols is None and vocabulary.q_rows.sharding.is_fully_replicated
    named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(state, partition_spec))
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, named)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "sizes, stack_axes, split_axes",
    [
        ((1, 8, 1), ("fsdp",), ()),
        ((2, 4, 4), ("fsdp", "tensor"), ("data",)),
        ((1, 16, 4), ("fsdp",), ("tensor",)),
    ],
)
def test_columns_are_cut_where_devices_outnumber_matrices(sizes, stack_axes, split_axes):
    mesh = jax.sharding.AbstractMesh(sizes, AXES)
    (plan,), _ = make_layout(
        {"layers/mlp/gate/kernel": (16, 64, 512)},
        view=llama_view,
        block_size=64,
        block_above=64,
        max_precond_dim=1000,
        mesh=mesh,
        partition_spec=partition_spec,
    )
    assert plan.cols.blocks == 8 and plan.padded == 16
    assert (set(plan.stack_axes), plan.split_axes) == (set(stack_axes), split_axes)


def test_a_mesh_needs_to_know_how_parameters_are_cut():
    mesh = jax.make_mesh((8,), ("fsdp",))
    with pytest.raises(ValueError, match="needs partition_spec"):
        soap(1e-3, mode="fast", mesh=mesh)


def test_an_inner_axis_that_is_cut_is_refused():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    rule = lambda path, ndim: P(None, None, None, "fsdp")  # noqa: E731
    view = lambda path, shape: TensorView(1, (1, 2))  # noqa: E731
    tx = soap(1e-3, mode="fast", mesh=mesh, partition_spec=rule, view=view)
    with pytest.raises(ValueError, match="'q/kernel': axis 3 of .* is cut over"):
        tx.init({"q": {"kernel": jnp.zeros((2, 4, 2, 8))}})
