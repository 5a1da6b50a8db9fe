"""The official mode against trajectories of the official code, and against NumPy restatements."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sa_jax.optim import soap
from sa_jax.optim.soap_shared import TensorView

RECTANGULAR = ("rect", "big")  # ill-posed at step 0: start from the reference's basis


@pytest.fixture(scope="module")
def reference(shared_data):
    with np.load(shared_data.parent / "reference" / "soap_reference.npz") as arrays:
        return dict(arrays)


def settings(case):
    """A case of the reference as arguments of `soap`."""
    rates = case["lr_per_step"]
    return {
        "learning_rate": case["lr"] if rates is None else lambda step: jnp.asarray(rates)[step],
        "b1": case["betas"][0],
        "b2": case["betas"][1],
        "shampoo_beta": None if case["shampoo_beta"] < 0 else case["shampoo_beta"],
        **{
            key: case[key]
            for key in ("eps", "weight_decay", "precondition_frequency", "max_precond_dim")
        },
        **{key: case[key] for key in ("correct_bias", "normalize_grads")},
    }


def trajectory(tx, p0, gradients, q_after_init=None):
    """Parameters before and after each step [steps + 1, ...], and the last state."""
    state = tx.init(p0)

    @jax.jit
    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    p, history = p0, [p0]
    for number, g in enumerate(gradients):
        p, state = step(p, state, g)
        history.append(p)
        if number == 0 and q_after_init is not None:
            state = state._replace(q=q_after_init)
    return np.stack(jax.device_get(history)), jax.device_get(state)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 5e-6)])
def test_every_case_of_the_reference(reference, dtype, tolerance):
    cases = json.loads(str(reference["meta_json"]))
    assert len(cases) >= 15
    with jax.enable_x64(dtype == "float64"):
        for name, case in cases.items():
            inject = None
            if case["grads"] in RECTANGULAR:
                keys = [f"{name}__Q{axis}_init" for axis in range(len(case["shape"]))]
                inject = tuple(
                    jnp.asarray(reference[key], dtype) if key in reference else None for key in keys
                )
            p0 = jnp.asarray(reference[f"p0__{case['grads']}"], dtype)
            gradients = jnp.asarray(reference[f"grads__{case['grads']}"], dtype)
            got, state = trajectory(soap(**settings(case)), p0, gradients, inject)
            assert got.dtype == dtype and state.mu.dtype == dtype
            want = reference[f"{name}__params"]
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=name)
            if dtype == "float64":
                np.testing.assert_allclose(
                    state.nu, reference[f"{name}__exp_avg_sq_final"], rtol=1e-7, err_msg=name
                )
                for axis, (gg, q) in enumerate(zip(state.gg, state.q, strict=True)):
                    if gg is None:
                        assert f"{name}__GG{axis}_final" not in reference
                        continue
                    want = reference[f"{name}__Q{axis}_final"]
                    np.testing.assert_allclose(
                        gg, reference[f"{name}__GG{axis}_final"], atol=1e-12, err_msg=name
                    )
                    np.testing.assert_allclose(np.abs(q.T @ want), np.eye(len(q)), atol=1e-7)


def numpy_soap(p, gradients, lr, b1, b2, sb, eps, wd, f, longest, bias, normalize):
    """The official loop for one parameter, in float64: parameters before and after each step."""
    sides = [axis for axis in range(p.ndim) if p.ndim > 1 and p.shape[axis] <= longest]
    m, v = np.zeros_like(p), np.zeros_like(p)
    gg = {axis: np.zeros((p.shape[axis],) * 2) for axis in sides}
    q, history = {}, [p]

    def along(x, matrices):
        for axis, matrix in matrices.items():
            x = np.moveaxis(np.tensordot(x, matrix, (axis, 0)), -1, axis)
        return x

    def back(x, matrices):
        return along(x, {axis: matrix.T for axis, matrix in matrices.items()})

    for t, g in enumerate(gradients):
        if t > 0:
            rotated = along(g, q)
            m, v = b1 * m + (1 - b1) * rotated, b2 * v + (1 - b2) * rotated**2
            direction = back(m / (np.sqrt(v) + eps), q)
            if normalize:
                direction /= 1e-30 + np.sqrt(np.mean(direction**2))
            size = lr[t] * (np.sqrt(1 - b2**t) / (1 - b1**t) if bias else 1)
            p = p - size * direction
            p = p - lr[t] * wd * p
            m = back(m, q)
        for axis in sides:
            flat = np.moveaxis(g, axis, 0).reshape(g.shape[axis], -1)
            gg[axis] = sb * gg[axis] + (1 - sb) * flat @ flat.T
        if t == 0:
            q = {axis: np.linalg.eigh(gg[axis])[1][:, ::-1] for axis in sides}
        elif t % f == 0:
            for axis in sides:
                order = np.argsort(-np.diag(q[axis].T @ gg[axis] @ q[axis]))
                v = np.take(v, order, axis)
                q[axis] = np.linalg.qr(gg[axis] @ q[axis][:, order])[0]
        if t > 0:
            m = along(m, q)
        history.append(p)
    return np.stack(history)


VARIANTS = {
    "defaults": {},
    "betas": {"b1": 0.9, "b2": 0.99, "shampoo_beta": 0.8},
    "no bias correction": {"correct_bias": False, "precondition_frequency": 1},
    "normalised": {"normalize_grads": True, "max_precond_dim": 6},
    "decay and schedule": {"weight_decay": 0.3, "precondition_frequency": 3, "eps": 1e-3},
}
# Well-posed after one gradient: no side is longer than the product of the others.
SHAPES = {"cube": (5, 6, 7), "tall": (24, 6), "wide": (4, 9), "square": (6, 6), "vec": (20,)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_shapes_and_settings(variant):
    """Several parameters at once, among them a scalar and leaves of size 1."""
    chosen = {"weight_decay": 0.0, "precondition_frequency": 4, "max_precond_dim": 8}
    chosen |= VARIANTS[variant]
    rng = np.random.default_rng(1)
    shapes = SHAPES | {"scalar": (), "one": (1,), "one_by_one": (1, 1)}
    p0 = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradients = {name: rng.normal(size=(12, *shape)) for name, shape in shapes.items()}
    rates = 1e-2 * np.linspace(1, 0.2, 12) if "schedule" in variant else np.full(12, 1e-2)
    with jax.enable_x64(True):
        schedule = (lambda step: jnp.asarray(rates)[step]) if "schedule" in variant else 1e-2
        tx = soap(schedule, **chosen)
        step = jax.jit(lambda p, s, g: tx.update(g, s, p))
        params, state = jax.tree.map(jnp.asarray, p0), tx.init(p0)
        for t in range(12):
            updates, state = step(params, state, jax.tree.map(lambda g, t=t: g[t], gradients))
            params = optax.apply_updates(params, updates)
        params = jax.device_get(params)
    for name in p0:
        want = numpy_soap(
            p0[name],
            gradients[name],
            rates,
            chosen.get("b1", 0.95),
            chosen.get("b2", 0.95),
            chosen.get("shampoo_beta", 0.95),
            chosen.get("eps", 1e-8),
            chosen["weight_decay"],
            chosen["precondition_frequency"],
            chosen["max_precond_dim"],
            chosen.get("correct_bias", True),
            chosen.get("normalize_grads", False),
        )
        np.testing.assert_allclose(params[name], want[-1], rtol=0, atol=1e-10, err_msg=name)


def test_a_view_makes_scanned_layers_independent_matrices():
    """[L, D, heads, head_dim] as L matrices of D x heads·head_dim, against L runs of one each."""
    rng = np.random.default_rng(2)
    p0, gradients = rng.normal(size=(2, 6, 2, 3)), rng.normal(size=(8, 2, 6, 2, 3))
    with jax.enable_x64(True):
        chosen = {"weight_decay": 0.1, "precondition_frequency": 2}
        tx = soap(1e-2, view=lambda path, shape: TensorView(1, (1, 2)), **chosen)
        stacked, state = trajectory(tx, jnp.asarray(p0), jnp.asarray(gradients))
        assert [gg.shape for gg in state.gg] == [(2, 6, 6), (2, 6, 6)]
        for layer in range(2):
            one, _ = trajectory(
                soap(1e-2, **chosen),
                jnp.asarray(p0[layer].reshape(6, 6)),
                jnp.asarray(gradients[:, layer].reshape(8, 6, 6)),
            )
            np.testing.assert_allclose(stacked[:, layer].reshape(9, 6, 6), one, rtol=0, atol=1e-10)


def test_decay_follows_the_mask_and_applies_to_the_moved_parameter():
    """With zero gradients only the decay moves anything, from the second step on."""
    tx = soap(0.1, weight_decay=0.5, mask={"a": True, "b": False})
    p = {"a": jnp.full((2, 2), 2.0), "b": {"c": jnp.ones(3)}}  # the mask is a prefix of the tree
    state = tx.init(p)
    zeros = jax.tree.map(jnp.zeros_like, p)
    for factor in (1.0, 0.95, 0.95**2):
        updates, state = tx.update(zeros, state, p)
        p = optax.apply_updates(p, updates)
        np.testing.assert_allclose(p["a"], np.full((2, 2), 2 * factor), rtol=1e-6)
        np.testing.assert_array_equal(p["b"]["c"], np.ones(3))


def test_bfloat16_parameters_have_float32_state():
    tx = soap(1e-2)
    p = jnp.ones((4, 4), jnp.bfloat16)
    state = tx.init(p)
    for _ in range(3):
        updates, state = tx.update(jnp.eye(4, dtype=jnp.bfloat16), state, p)
        p = optax.apply_updates(p, updates)
    assert p.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert np.isfinite(np.asarray(p, np.float32)).all() and p[0, 0] < 1


@pytest.mark.parametrize(
    "change", [{"precondition_frequency": 0}, {"max_precond_dim": -1}, {"mode": "quick"}]
)
def test_impossible_settings_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        soap(1e-3, **change)


def test_a_view_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"does not fit 'w' of shape \(2, 3\)"):
        soap(1e-3, view=lambda path, shape: TensorView(1, (1, 1))).init({"w": jnp.ones((2, 3))})
