"""The fast mode: against the official trajectories, its bases, its schedule, and bad input."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sa_jax.llama.lora import LoraConfig, split
from sa_jax.optim import soap, soap_linalg, soap_refresh
from sa_jax.optim.build import decay_mask, llama_view
from sa_jax.optim.soap_layout import make_layout
from sa_jax.optim.soap_shared import TensorView
from sa_jax.parallel.mesh import make_mesh
from sa_jax.planning.topology import open_topology
from tests.toys import random_params


def fast(**changes):
    """Float32 operands, so that runs can be compared closely."""
    settings = {"weight_decay": 0.0, "matmul_dtype": jnp.float32, "block_size": 64} | changes
    return soap(settings.pop("learning_rate", 1e-2), mode="fast", **settings)


def run(tx, params, gradients, between=lambda step, state: state):
    """Parameters after each step, and the last state."""
    state = tx.init(params)
    step = jax.jit(lambda p, s, g: tx.update(g, s, p))
    history = []
    for number, g in enumerate(gradients):
        updates, state = step(params, state, g)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get(params))
        state = between(number, state)
    return history, state


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    "f, changes", [(1, {}), (3, {"weight_decay": 0.1, "normalize_grads": True})]
)
def test_from_the_same_bases_it_is_the_official_algorithm(f, changes):
    """Whole factors and no dense phase: writing columns back instead of sorting changes nothing."""
    shared = {"precondition_frequency": f, "weight_decay": 0.0} | changes
    p, gradients = {"w": jnp.asarray(normal(0, 6, 9)), "n": jnp.ones(4)}, []
    gradients = [{"w": normal(t, 6, 9), "n": normal(t, 4)} for t in range(1, 20)]
    start = {}

    def keep(number, state):
        start[number] = state
        return state

    got, state = run(fast(dense_steps=0, **shared), p, gradients, keep)
    (stack,) = start[0].stacks.values()

    def inject(number, state):
        q = {"w": (stack.q_rows[0, 0], stack.q_cols[0, 0]), "n": ()}
        return state._replace(q=q) if number == 0 else state

    want, official = run(soap(1e-2, **shared), p, gradients, inject)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a["w"], b["w"], rtol=0, atol=5e-6)
        np.testing.assert_allclose(a["n"], b["n"], rtol=0, atol=5e-6)
    (stack,) = state.stacks.values()
    np.testing.assert_allclose(stack.gg_cols[0, 0], official.gg["w"][1], atol=1e-5)


def test_blocks_are_the_official_algorithm_on_parts_where_only_one_side_has_a_basis():
    """Columns without a basis, rows in two blocks: each block of rows is a matrix of its own."""
    gradients = [normal(t, 8, 5) for t in range(1, 15)]
    view = lambda path, shape: TensorView(0, (1, 1), skip=(1,))  # noqa: E731
    whole, _ = run(fast(block_size=4, view=view), jnp.zeros((8, 5)), gradients)
    for rows in (slice(0, 4), slice(4, 8)):
        part, _ = run(fast(view=view), jnp.zeros((4, 5)), [g[rows] for g in gradients])
        np.testing.assert_allclose(whole[-1][rows], part[-1], rtol=0, atol=1e-6)


def test_a_side_that_blocks_do_not_divide_is_filled_up():
    """11 rows in blocks of 6 and 6; a row of zeros at the end changes nothing that is seen."""
    gradients = [normal(t, 11, 3) for t in range(1, 8)]
    view = lambda path, shape: TensorView(0, (1, 1), skip=(1,))  # noqa: E731
    history, state = run(fast(block_size=6, view=view), jnp.zeros((11, 3)), gradients)
    (stack,) = state.stacks.values()
    assert stack.gg_rows.shape == (1, 2, 6, 6) and stack.mu_ncr.shape == (1, 3, 12)
    padded = [np.pad(g, [(0, 1), (0, 0)]) for g in gradients]
    want, _ = run(fast(block_size=6, view=view), jnp.zeros((12, 3)), padded)
    np.testing.assert_allclose(history[-1], want[-1][:11], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(want[-1][11], 0)


def test_blocks_are_a_few_more_where_then_nothing_is_left_over():
    state = jax.eval_shape(fast(block_size=4, max_precond_dim=10).init, jnp.zeros((10, 11)))
    (stack,) = state.stacks.values()
    assert stack.gg_rows.shape == (1, 5, 2, 2) and stack.mu_ncr.shape == (1, 11, 10)


def test_the_first_bases_are_eight_lifted_iterations_from_the_identity():
    """Up to signs; without the lift, or with fewer, they are other ones."""
    _, state = run(fast(), jnp.zeros((8, 8)), [normal(0, 8, 8)])
    (stack,) = state.stacks.values()
    for gg, q in ((stack.gg_rows, stack.q_rows), (stack.gg_cols, stack.q_cols)):
        want, _ = soap_linalg.refreshed_bases(gg[0], jnp.eye(8)[None], 8, 1e-2)
        np.testing.assert_allclose(np.abs(q[0]), np.abs(want), atol=1e-4)


@pytest.mark.parametrize("n, panel", [(40, 16), (33, 32), (16, 16)])
def test_blocked_qr_is_qr_up_to_signs(n, panel):
    y = normal(0, 3, n, n)
    q = jax.jit(soap_linalg._blocked_qr, static_argnums=1)(y, panel)
    want = np.linalg.qr(y.astype(np.float64))[0]
    signs = np.sign(np.sum(q * want, axis=1, keepdims=True))
    np.testing.assert_allclose(q * signs, want, atol=2e-5)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_blocked_qr_of_a_singular_matrix_is_orthogonal(rank):
    y = 1e-6 * normal(0, 1, 40, rank) @ normal(1, 1, rank, 40)
    q = soap_linalg._blocked_qr(jnp.asarray(y), 16)[0]
    np.testing.assert_allclose(q.T @ q, np.eye(40), atol=1e-5)


def test_reflections_in_three_passes_keep_bases_orthogonal(monkeypatch):
    """What a TPU does: products of bfloat16 high and low parts. The factor has a condition
    of 1e8, and the limit of what is accepted is 1e-3."""

    def parts(x):
        high = jax.lax.reduce_precision(x, 8, 7)
        return high, jax.lax.reduce_precision(x - high, 8, 7)

    def three_passes(subscripts, x, y):
        (a, b), (c, d) = parts(x), parts(y)
        return sum(jnp.einsum(subscripts, *pair) for pair in ((a, c), (a, d), (b, c)))

    basis = np.linalg.qr(normal(0, 640, 640))[0]
    y = jnp.asarray(basis * np.logspace(0, -8, 640, dtype=np.float32) @ normal(1, 640, 640))[None]
    exact = soap_linalg._blocked_qr(y, 256)[0]
    monkeypatch.setattr(soap_linalg, "three_passes", three_passes)
    q = soap_linalg._blocked_qr(y, 256)[0]
    assert np.abs(q - exact).max() > 1e-5  # it is another arithmetic
    np.testing.assert_allclose(q.T @ q, np.eye(640), atol=1e-4)
    below = np.tril(np.asarray(q, np.float64).T @ np.asarray(y[0], np.float64), -1)
    assert np.abs(below).max() < 1e-4 * np.abs(y).max()  # R is triangular


def test_products_by_blocks_are_those_with_whole_block_diagonal_matrices():
    """Two matrices with 2 blocks of rows and 3 of columns, against numpy in float64."""
    x, q_rows, q_cols = normal(0, 2, 6, 12), normal(1, 2, 2, 3, 3), normal(2, 2, 3, 4, 4)

    def whole(blocks):
        """[k, b, b] -> [k·b, k·b]"""
        k, b, _ = blocks.shape
        return np.einsum("kij,kl->kilj", blocks.astype(np.float64), np.eye(k)).reshape(k * b, k * b)

    rows, cols = (np.stack([whole(blocks) for blocks in q]) for q in (q_rows, q_cols))
    rotate = functools.partial(soap_linalg.rotate, x, dtype=jnp.float32)
    np.testing.assert_allclose(rotate(q_rows, q_cols), (rows.mT @ x @ cols).mT, atol=1e-5)
    np.testing.assert_allclose(rotate(q_rows, None), (rows.mT @ x).mT, atol=1e-5)
    np.testing.assert_allclose(rotate(None, q_cols), (x @ cols).mT, atol=1e-5)
    of_rows = np.stack([whole(np.ones((2, 3, 3)))] * 2) * (x @ x.mT)
    of_cols = np.stack([whole(np.ones((3, 4, 4)))] * 2) * (x.mT @ x)
    for side, blocks, want in ((1, 2, of_rows), (2, 3, of_cols)):
        got = np.asarray(soap_linalg.gram(x, side, blocks, jnp.float32))
        np.testing.assert_allclose(np.stack([whole(each) for each in got]), want, atol=1e-5)


def test_turning_back_undoes_a_rotation():
    x = normal(0, 2, 6, 12)
    q_rows, q_cols = (np.linalg.qr(normal(1, 2, k, b, b))[0] for k, b in ((2, 3), (3, 4)))
    turned = soap_linalg.rotate(x, q_rows, q_cols, jnp.float32)
    back = soap_linalg.rotate(turned, q_cols.mT, q_rows.mT, jnp.float32)
    np.testing.assert_allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("n", [256, 257, 300, 520])
def test_long_and_short_bases_are_orthogonal(n):
    q = soap_linalg.orthonormal(jnp.asarray(normal(0, 1, n, n)))[0]
    np.testing.assert_allclose(q.T @ q, np.eye(n), atol=1e-5)


def test_qr_iterations_reach_the_eigenvectors_and_keep_their_slots():
    x = normal(0, 8, 8)
    values = 3.0 ** np.arange(8)
    basis = np.linalg.qr(x)[0]
    factor = jnp.asarray((basis * values) @ basis.T)[None]
    q, good = soap_linalg.refreshed_bases(factor, jnp.eye(8)[None], 30, 0.0)
    assert good.all()
    rotated = np.asarray(q[0]).T @ factor[0] @ q[0]
    np.testing.assert_allclose(np.sort(np.diag(rotated)), values, rtol=1e-3)
    again, _ = soap_linalg.refreshed_bases(factor, q, 1, 0.0)
    np.testing.assert_allclose(np.abs(np.diag(again[0].T @ q[0])), np.ones(8), atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_basis_that_is_not_finite_is_not_taken(bad):
    factors = np.stack([np.eye(4, dtype=np.float32)] * 2)
    factors[1, 0, 0] = bad
    old = jnp.stack([jnp.eye(4)] * 2)
    q, good = soap_linalg.refreshed_bases(jnp.asarray(factors), old, 1, 0.0)
    assert list(good) == [True, False]
    np.testing.assert_array_equal(q[1], np.eye(4))


def test_a_basis_that_is_not_orthogonal_is_not_taken(monkeypatch):
    """The QR of the second matrix is made to be off by a thousandth and more."""
    qr = soap_linalg.orthonormal
    monkeypatch.setattr(soap_linalg, "orthonormal", lambda y: qr(y).at[1].multiply(1.001))
    x = normal(0, 2, 4, 4)
    old = jnp.stack([jnp.eye(4)] * 2)
    q, good = soap_linalg.refreshed_bases(jnp.asarray(x @ x.mT), old, 1, 0.0)
    assert list(good) == [True, False]
    assert not np.allclose(np.abs(q[0]), np.eye(4))
    np.testing.assert_array_equal(q[1], np.eye(4))


def test_update_leaves_its_arguments_alone():
    """Not under jit, where each call has copies; and in a branch, whose values may not leave it."""
    tx, params = fast(), jnp.ones((4, 6))
    state = tx.init(params)
    _, state = tx.update(normal(0, 4, 6), state, params)
    before = jax.device_get(state)
    once, _ = tx.update(normal(1, 4, 6), state, params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)

    @jax.jit
    def sometimes(due, state):
        same = (jnp.zeros_like(params), state)
        return jax.lax.cond(due, lambda: tx.update(normal(1, 4, 6), state, params), lambda: same)

    np.testing.assert_allclose(sometimes(True, state)[0], once, atol=1e-6)


@pytest.mark.parametrize("mode", ["fast", "official"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4, 6)])
def test_normalised_directions_fade_with_the_gradient(mode, shape):
    """Zeros first, then one gradient, then zeros until float32 has nothing left of it."""
    tx = soap(1e-2, weight_decay=0.0, normalize_grads=True, mode=mode)
    params = jnp.ones(shape)

    def step(carry, number):
        params, state = carry
        g = jnp.where((number == 2) | (number == 3), jnp.ones(shape), 0.0)
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), jnp.abs(updates).max()

    steps = jnp.arange(1800)
    _, moved = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), steps))()
    assert (moved[:2] == 0).all() and moved[3] > 1e-3 and moved[-1] == 0
    assert moved.max() < 0.3


def test_wide_sides_are_cut_and_vocabularies_left_out_by_default():
    state = jax.eval_shape(
        soap(1e-2, mode="fast").init, {"up": jnp.zeros((8, 14336)), "embed": jnp.zeros((128256, 8))}
    )
    assert state.stacks["1x8x14336"].gg_cols.shape == (1, 7, 2048, 2048)
    assert state.stacks["1x8x128256"].gg_cols is None


def test_dense_then_sparse():
    gradients = [normal(t, 4, 4) for t in range(12)]
    changed, last = [], [None]

    def watch(number, state):
        (stack,) = state.stacks.values()
        q = np.asarray(stack.q_rows)
        if last[0] is not None:
            changed.append(not np.allclose(np.abs(q), np.abs(last[0]), atol=1e-7))
        last[0] = q
        return state

    run(fast(dense_steps=3, precondition_frequency=4), jnp.zeros((4, 4)), gradients, watch)
    assert [t for t, is_new in enumerate(changed, 1) if is_new] == [1, 2, 3, 4, 8]


@pytest.mark.parametrize("slots, turns, most", [(5, [0, 1, 2, 3, 4], 3), (3, [0, 1, 3], 5)])
def test_slots_refresh_every_matrix_once_a_period_and_few_at_a_time(slots, turns, most):
    gradients = [{"a": normal(t, 6, 4, 4), "b": normal(t, 2, 4, 8)} for t in range(13)]
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    seen, last = [], [None]

    def watch(number, state):
        now = np.concatenate([np.abs(stack.q_rows[:, 0]) for stack in state.stacks.values()])
        if last[0] is not None:
            seen.append(np.abs(now - last[0]).max(axis=(1, 2)) > 1e-7)
        last[0] = now
        return state

    tx = fast(dense_steps=2, precondition_frequency=5, refresh_slots=slots)
    _, state = run(tx, params, gradients, watch)
    assert set(state.stacks) == {"6x4x4", "2x4x8"}
    refreshed = np.array(seen)[2:]  # after the dense steps
    assert (refreshed[:5].sum(axis=0) == 1).all() and (refreshed[5:10].sum(axis=0) == 1).all()
    assert refreshed.sum(axis=1).max() <= most
    steps = 3 + np.arange(10)  # the first refresh that `seen` tells of is that of step 1
    assert {*(steps[refreshed[:10].any(axis=1)] % 5)} <= {*turns}


def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was():
    gradients = [{"w": normal(t, 4, 6), "n": normal(t, 3)} for t in range(8)]
    params = jax.tree.map(jnp.ones_like, gradients[0])
    spoilt = [*gradients]
    for place in (0, 4):  # also before there is any basis
        spoilt.insert(place, {"w": normal(0, 4, 6) * np.nan, "n": normal(0, 3)})
    tx = fast(weight_decay=0.1)
    want, _ = run(tx, params, gradients)
    got, state = run(tx, params, spoilt)
    assert (int(state.count), int(state.skipped), int(state.rejected)) == (10, 2, 0)
    for name in params:
        np.testing.assert_array_equal(got[4][name], got[3][name])
        np.testing.assert_array_equal(got[-1][name], want[-1][name])


@pytest.mark.parametrize("field", ["q_rows", "gg_cols"])
def test_a_matrix_whose_state_is_spoilt_stands_still_and_is_counted(field):
    """Only that matrix: the other of the stack goes on as if nothing had happened. It is seen at
    every step, whether or not bases are refreshed."""
    gradients = [normal(t, 2, 4, 4) for t in range(8)]
    spoilt = []

    def spoil(number, state):
        if number != 2:
            return state
        ((name, stack),) = state.stacks.items()
        spoilt.append(stack)
        broken = getattr(stack, field).at[1, 0, 0, 0].set(jnp.nan)
        return state._replace(stacks={name: dataclasses.replace(stack, **{field: broken})})

    # It does not decay either.
    tx = fast(precondition_frequency=4, dense_steps=0, weight_decay=0.5)
    want, _ = run(tx, jnp.ones((2, 4, 4)), gradients)
    got, state = run(tx, jnp.ones((2, 4, 4)), gradients, spoil)
    assert int(state.rejected) == 5 and int(state.skipped) == 0
    np.testing.assert_array_equal(got[-1][0], want[-1][0])
    np.testing.assert_array_equal(got[-1][1], got[2][1])
    (stack,) = state.stacks.values()
    np.testing.assert_array_equal(stack.nu_ncr[1], spoilt[-1].nu_ncr[1])
    np.testing.assert_array_equal(stack.gg_rows[1], spoilt[-1].gg_rows[1])


@pytest.mark.parametrize(
    "cols, index", [(4, 3), (6, 1)], ids=["both sides in one batch", "a batch for each side"]
)
def test_a_step_whose_new_basis_is_refused_does_not_move_that_matrix(monkeypatch, cols, index):
    """The columns' basis of the second of two matrices comes out too long."""
    qr, gradients = soap_linalg.orthonormal, [normal(t, 2, 4, cols) for t in range(4)]
    want, _ = run(fast(), jnp.ones((2, 4, cols)), gradients)

    def too_long(y):
        return qr(y).at[index].multiply(1.01) if y.shape[-1] == cols else qr(y)

    monkeypatch.setattr(soap_linalg, "orthonormal", too_long)
    got, state = run(fast(weight_decay=0.0), jnp.ones((2, 4, cols)), gradients)
    assert int(state.rejected) == 4
    np.testing.assert_array_equal(got[-1][0], want[-1][0])
    np.testing.assert_array_equal(got[-1][1], 1)


@pytest.mark.parametrize("at_once, matrices", [(1, 1), (200, 2), (2**26, 6)])
def test_how_many_matrices_are_refreshed_at_once_changes_nothing(monkeypatch, at_once, matrices):
    """6 matrices of 24 numbers with bases of 52: one, two, or all at once."""
    gradients = [normal(t, 6, 4, 6) for t in range(5)]
    want, _ = run(fast(), jnp.ones((6, 4, 6)), gradients)
    monkeypatch.setattr(soap_refresh, "_AT_ONCE", at_once)
    got, state = run(fast(), jnp.ones((6, 4, 6)), gradients)
    (stack,) = state.stacks.values()
    assert soap_refresh._matrices_together(stack, 6) == matrices
    np.testing.assert_allclose(got[-1], want[-1], rtol=0, atol=1e-6)


def test_the_mean_of_a_normalised_update_counts_no_padding():
    """11 rows in two blocks of 6."""
    tx = fast(normalize_grads=True, block_size=6, correct_bias=False)
    history, _ = run(tx, jnp.zeros((11, 10)), [normal(t, 11, 10) for t in range(3)])
    update = np.float64(history[2] - history[1])
    np.testing.assert_allclose(np.sqrt(np.mean(update**2)), 1e-2, rtol=1e-5)


def test_no_float32_product_is_left_to_a_tpu_s_default():
    """By default a TPU would round its operands to bfloat16."""
    params = {"w": jnp.ones((2, 4, 300)), "v": jnp.ones((8, 12))}
    tx = fast(block_size=300)
    text = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
    precisions = re.findall(r"\bprecision=(.*?)\n", text)  # not printed where it is the default
    assert len(precisions) == text.count("dot_general[") > 10
    both = ("(Precision.HIGHEST, Precision.HIGHEST)", "(Precision.HIGH, Precision.HIGH)")
    assert set(precisions) == set(both)


def test_gradients_of_zeros_and_of_rank_one_keep_bases_orthogonal():
    params = {"zero": jnp.ones((3, 4, 6)), "one": jnp.ones((5, 7))}
    gradients = [
        {"zero": np.zeros((3, 4, 6), np.float32), "one": normal(t, 5, 1) @ normal(0, 1, 7)}
        for t in range(30)
    ]
    history, state = run(fast(), params, gradients)
    assert int(state.rejected) == 0
    np.testing.assert_array_equal(history[-1]["zero"], params["zero"])
    assert np.isfinite(history[-1]["one"]).all() and (history[-1]["one"] != 1).any()
    for stack in state.stacks.values():
        for q in (stack.q_rows, stack.q_cols):
            gram = np.einsum("nkij,nkil->nkjl", q, q)
            np.testing.assert_allclose(
                gram, np.broadcast_to(np.eye(q.shape[-1]), gram.shape), atol=1e-5
            )


def test_small_leaves_get_adam():
    """Scalars, vectors, 1 x 1 matrices, and matrices without a side to precondition."""
    shapes = {"scalar": (), "one": (1,), "tiny": (1, 1), "long": (9, 9)}
    gradients = [{k: normal(t, *shape) for k, shape in shapes.items()} for t in range(6)]
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    history, state = run(fast(max_precond_dim=8), params, gradients)
    assert not state.stacks and set(state.mu) == set(shapes)
    want, _ = run(soap(1e-2, weight_decay=0.0, max_precond_dim=8), params, gradients)
    for name in ("scalar", "one", "long"):
        np.testing.assert_allclose(history[-1][name], want[-1][name], rtol=1e-6)


def test_bfloat16_parameters_have_float32_state():
    params = {"w": jnp.ones((4, 4), jnp.bfloat16), "n": jnp.ones(3, jnp.bfloat16)}
    gradients = [
        jax.tree.map(lambda p, t=t: normal(t, *p.shape).astype(p.dtype), params) for t in range(4)
    ]
    history, state = run(fast(matmul_dtype=jnp.bfloat16), params, gradients)
    assert {x.dtype for x in jax.tree.leaves(history[-1])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_works_masked_and_beside_other_transforms():
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((4, 6))}
    gradients = [{"a": normal(t, 4, 6), "b": normal(t, 4, 6)} for t in range(5)]
    alone, _ = run(fast(), params["a"], [g["a"] for g in gradients])
    frozen = optax.chain(
        optax.masked(fast(), {"a": True, "b": False}),
        optax.masked(optax.set_to_zero(), {"a": False, "b": True}),
    )
    labels = {"a": "soap", "b": "frozen"}
    split_up = optax.multi_transform({"soap": fast(), "frozen": optax.set_to_zero()}, labels)
    for tx in (frozen, split_up):
        history, _ = run(tx, params, gradients)
        np.testing.assert_array_equal(history[-1]["a"], alone[-1])
        np.testing.assert_array_equal(history[-1]["b"], params["b"])


def test_llama_leaves_are_stacked_by_shape():
    """Scanned layers are matrices, heads are merged, the vocabulary has no factor, norms Adam."""
    params = jax.eval_shape(lambda: random_params())
    with_paths, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_paths]
    shapes = [leaf.shape for _, leaf in with_paths]
    plans, elementwise = make_layout(
        dict(zip(paths, shapes, strict=True)),
        view=llama_view,
        block_size=16,
        block_above=16,
        max_precond_dim=1000,
    )
    found = {plan.name: plan for plan in plans}
    assert set(found) == {"2x32x64", "6x32x32", "6x32x64", "9x32x48"}
    assert found["2x32x64"].cols.blocks == 0 and found["6x32x64"].cols.blocks == 4
    assert [leaf.transposed for leaf in found["9x32x48"].leaves] == [True, False, False]
    assert all(path.endswith("scale") for path in elementwise) and elementwise


def test_adapters_move():
    shapes = jax.eval_shape(lambda: random_params(lora=LoraConfig(4, 8.0, "attention/(q|v)")))
    params = jax.tree.map(lambda p: jnp.zeros(p.shape), split(shapes)[0])
    gradients = [jax.tree.map(lambda p, t=t: normal(t, *p.shape), params) for t in range(4)]
    tx = fast(view=llama_view, mask=decay_mask)
    history, state = run(tx, params, gradients)
    assert set(state.stacks) == {"9x4x32", "3x4x64"}  # both of v's, q's first; q's second
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), history[-1], jax.device_get(params))
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"precondition_frequency": 0},
        {"block_size": 0},
        {"block_size": -5},
        {"refresh_slots": 0},
        {"refresh_slots": 11},
        {"dense_steps": -1},
    ],
)
def test_impossible_settings_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value}: must be"):
        fast(**change)


def test_no_product_of_a_refresh_on_tpus_loses_its_precision():
    """Compiled for chips that refresh one matrix each: there XLA loses what
    `jax.lax.DotAlgorithmPreset` says."""
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    mesh = make_mesh(4, 1, 1, devices=open_topology("v5p:2x2x1").devices)
    spec = jax.sharding.PartitionSpec("data")
    placed = jax.sharding.NamedSharding(mesh, spec)
    matrices = jax.ShapeDtypeStruct((4, 1024, 1024), jnp.float32, sharding=placed)

    def bases(gg, q):
        return soap_linalg.refreshed_bases(gg, q, 1, 0.0)[0]

    run = jax.shard_map(bases, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    text = jax.jit(run).lower(matrices, matrices).compile().as_text()
    products = [line for line in text.splitlines() if " convolution(" in line]
    assert len(products) > 10
    assert [line for line in products if "operand_precision={high" not in line] == []
