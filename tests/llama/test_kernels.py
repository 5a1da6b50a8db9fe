"""Attention kernels against the reference; splash runs in interpret mode on CPU."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

from sa_jax.errors import UsageError
from sa_jax.llama.attention import attention, choose_attention
from sa_jax.llama.kernels import block_sizes, first_keys, offsets_are_right, packed_offsets
from sa_jax.parallel.mesh import make_mesh
from tests import toys

ROWS, LENGTH = 2, 256


def inputs(head_dim, heads=4, kv_heads=2):
    """Queries, keys, values, segment ids of packed rows with padding, and a cotangent."""
    rng = np.random.default_rng(head_dim)
    shapes = [(ROWS, LENGTH, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, g = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    segments = np.zeros((ROWS, LENGTH), np.int32)
    segments[0, :50], segments[0, 50:200], segments[0, 200:230] = 1, 2, 3
    segments[1] = 1
    return q, k, v, segments, g


def forward_and_gradients(implementation, mesh, q, k, v, segments, g):
    def run(q, k, v):
        return attention(q, k, v, segments, implementation=implementation, mesh=mesh)

    out, back = jax.vjp(run, q, k, v)
    return out, *back(g)


def relative(a, b):
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.mark.parametrize("head_dim", [128, 64, 8])
def test_splash_is_reference_forward_and_backward(head_dim):
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    arguments = inputs(head_dim)
    with jax.default_matmul_precision("highest"):
        ours, oracle = (
            jax.jit(lambda *a, name=name: forward_and_gradients(name, mesh, *a))(*arguments)
            for name in ("splash", "reference")
        )
    for a, b in zip(ours, oracle, strict=True):
        assert a.dtype == b.dtype
        assert relative(np.asarray(a), np.asarray(b)) < 1e-5


def test_splash_sees_no_other_document():
    mesh = toys.one_device_mesh()
    q, k, v, segments, _ = inputs(8)

    def second_document(k):
        out = attention(q, k, v, segments, implementation="splash", mesh=mesh)
        return jnp.sum(jnp.square(out[0, 50:200]))

    gradient = np.asarray(jax.jit(jax.grad(second_document))(k))
    assert np.all(gradient[0, :50] == 0) and np.all(gradient[0, 200:] == 0)
    assert np.all(gradient[1] == 0) and np.any(gradient[0, 50:200] != 0)


def test_blocks_follow_the_generation_and_divide_the_length():
    assert block_sizes("TPU v5", 4096).block_q == 1024
    assert block_sizes("TPU v5 lite", 4096).block_q == 512
    assert block_sizes("TPU v6 lite", 1536).block_kv == 512
    assert block_sizes("cpu", 4096).block_q == 128


@pytest.mark.parametrize(
    ("name", "platform", "length", "dtype", "chosen"),
    [
        ("auto", "cpu", 128, "float32", "unrolled"),
        ("auto", "cpu", 2048, "float32", "blockwise"),
        ("auto", "tpu", 4096, "bfloat16", "splash"),
        ("auto", "tpu", 100, "bfloat16", "blockwise"),
        ("auto", "gpu", 4096, "bfloat16", "cudnn"),
        ("auto", "gpu", 4160, "bfloat16", "blockwise"),
        ("auto", "gpu", 4096, "float32", "blockwise"),
        ("splash", "cpu", 256, "float32", "splash"),
        ("cudnn", "gpu", 256, "float16", "cudnn"),
    ],
)
def test_auto_takes_what_the_platform_has(name, platform, length, dtype, chosen):
    choice = choose_attention(name, platform, sequence_length=length, dtype=dtype)
    assert choice.implementation == chosen and choice.why


@pytest.mark.parametrize(
    ("name", "platform", "length", "dtype", "words"),
    [
        ("flash", "gpu", 256, "bfloat16", "is unknown; use auto, reference, unrolled, block"),
        ("cudnn", "gpu", 256, "float32", "bfloat16 or float16.*'float32'"),
        ("cudnn", "gpu", 4160, "bfloat16", "multiples of 128, not 4160.*NaN.*take 4224"),
        ("cudnn", "cpu", 256, "bfloat16", "for NVIDIA GPUs, and this runs on cpu"),
        ("cudnn_packed", "cpu", 256, "bfloat16", "'cudnn_packed' is for NVIDIA GPUs"),
        ("cudnn_packed", "gpu", 4160, "bfloat16", "multiples of 128"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(name, platform, length, dtype, words):
    with pytest.raises(UsageError, match=words):
        choose_attention(name, platform, sequence_length=length, dtype=dtype)


def test_splash_names_the_length_that_would_do():
    q, k, v, segments, _ = (x[:, :200] for x in inputs(8))
    with pytest.raises(UsageError, match="multiples of 128, not 200; take 256"):
        attention(q, k, v, segments, implementation="splash", mesh=make_mesh(fsdp=2, tensor=4))


@pytest.mark.skipif(offsets_are_right(), reason="this jax holds jax-ml/jax#39521")
def test_packed_cudnn_is_refused_by_a_jax_that_would_be_wrong():
    with pytest.raises(UsageError, match=f"wrong in jax {jax.__version__} where heads share keys"):
        choose_attention("cudnn_packed", "gpu", sequence_length=256, dtype="bfloat16")


def replayed(q_bskh, k_bskh, v_bskh, segments, most):
    """What cuDNN reads and writes by jax's own offsets, in numpy; NaN where it writes nothing."""
    b, s, heads, h = q_bskh.shape
    lengths, starts, _ = packed_offsets(segments, most)
    lengths, _, starts, _ = jax_cudnn._fix_seqlen_offsets(
        lengths, lengths, starts, starts, q_bskh, k_bskh
    )
    out = np.full(q_bskh.size, np.nan, np.float32)
    for length, start in zip(np.ravel(lengths), np.ravel(starts), strict=False):
        if length > 0:
            part = slice(start, start + length * heads * h)
            q, k, v = (x.ravel()[part].reshape(length, heads, h) for x in (q_bskh, k_bskh, v_bskh))
            scores = np.einsum("qnh,knh->nqk", q, k) * h**-0.5
            weights = np.exp(np.where(np.tri(length, dtype=bool), scores, -np.inf))
            weights /= weights.sum(-1, keepdims=True)
            out[part] = np.einsum("nqk,knh->qnh", weights, v).ravel()
    return out.reshape(q_bskh.shape)


@pytest.mark.parametrize(
    "lengths",
    [((10, 1, 30, 15), (40, 3)), ((64,), (1, 1, 62)), ((1,) * 8, (64,))],
    ids=["padded", "full", "one_token"],
)
def test_packed_offsets_are_the_documents(lengths):
    segments = np.zeros((2, 64), np.int32)
    for row, each in zip(segments, lengths, strict=True):
        row[: sum(each)] = np.repeat(np.arange(1, len(each) + 1), each)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 64, 4, 8)).astype(np.float32) for _ in range(3))
    oracle = attention(q, k, v, jnp.asarray(segments))
    np.testing.assert_allclose(replayed(q, k, v, jnp.asarray(segments), 9), oracle, atol=1e-6)
    documents = [len(each) + (sum(each) < 64) for each in lengths]
    assert packed_offsets(jnp.asarray(segments), 2)[2].tolist() == documents  # 2 cuts some off


def test_the_first_keys_are_the_documents():
    segments = jnp.asarray([[1, 1, 1, 2, 3, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 2]])
    index = np.arange(8)
    seen = (np.asarray(first_keys(segments))[:, :, None] <= index) & (index <= index[:, None])
    same = np.asarray(segments[:, :, None] == segments[:, None])
    np.testing.assert_array_equal(seen, same & (index <= index[:, None]))


@pytest.mark.parametrize(
    ("version", "length", "words"),
    [
        (None, 256, "needs tokamax 0.0.12, which is not installed.*pip install tokamax==0.0.12"),
        ("0.0.17", 256, "needs tokamax 0.0.12, and 0.0.17 is installed"),
        ("0.0.12", 200, "multiples of 128, not 200; take 256"),
    ],
)
def test_tokamax_is_refused_where_it_would_be_wrong(monkeypatch, version, length, words):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(UsageError, match=words):
        choose_attention("tokamax", "gpu", sequence_length=length, dtype="bfloat16")


@pytest.mark.long
def test_tokamax_sees_its_own_document_and_is_compiled_for_hopper():
    """Its kernel runs on a GPU alone: here the mask is tried in its plain implementation."""
    pytest.importorskip("tokamax", reason="needs tokamax 0.0.12")
    from absl import flags
    from tokamax._src.ops.attention import api, base

    flags.FLAGS(["tokamax"])  # or it reads those of pytest
    q, k, v, segments, cotangent = inputs(8)
    mask = base.Mask(k_start=first_keys(segments)[:, None], is_causal=True)
    out, back = jax.vjp(lambda *x: api.IMPLEMENTATIONS["xla_chunked"](*x, mask=mask), q, k, v)
    oracle, oracle_back = jax.vjp(lambda *x: attention(*x, segments), q, k, v)
    np.testing.assert_allclose(out, oracle, atol=1e-5)
    for ours, theirs in zip(back(cotangent), oracle_back(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)

    mesh = make_mesh(fsdp=4, tensor=2)

    def loss(q, k, v, segments):
        out = attention(q, k, v, segments, implementation="tokamax", mesh=mesh)
        return jnp.sum(out.astype(jnp.float32))

    shapes = [jax.ShapeDtypeStruct((8, LENGTH, n, 128), "bfloat16") for n in (8, 4, 4)]
    segments = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes, segments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3  # forward, dQ, dK with dV
    assert f"{LENGTH}x{LENGTH}x" not in text


def test_packed_cudnn_gets_no_mask_and_gives_nan_for_too_many_documents():
    mesh = make_mesh(fsdp=4, tensor=2)

    def run(q, k, v, segments):
        return attention(q, k, v, segments, implementation="cudnn_packed", mesh=mesh)

    shapes = [jax.ShapeDtypeStruct((8, LENGTH, n, 64), "bfloat16") for n in (8, 4, 4)]
    segments = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32)
    text = jax.jit(run).trace(*shapes, segments).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "@__cudnn$fmha" in line)
    assert f"x{LENGTH}x{LENGTH}x" not in call and "PADDING_CAUSAL" in call
    assert "0x7FC0" in text.partition("@__cudnn$fmha")[2]  # bfloat16's NaN


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_gets_one_mask_for_all_heads_and_gives_no_gradient_of_it(dtype):
    """Read from the step as it is lowered for CUDA, on each device of a mesh."""
    mesh = make_mesh(fsdp=4, tensor=2)

    def loss(q, k, v, segments):
        out = attention(q, k, v, segments, implementation="cudnn", mesh=mesh)
        return jnp.sum(out.astype(jnp.float32))

    shapes = [jax.ShapeDtypeStruct((8, LENGTH, n, 64), dtype) for n in (8, 4, 4)]
    segments = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes, segments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
    assert len(calls) == 2 and "SoftmaxBackward" in calls[1]
    mask = f"2x1x{LENGTH}x{LENGTH}x"
    for call in calls:
        operands, results = call.rsplit("->", 1)
        assert operands.count(mask) == 1 and mask not in results
        assert r"\22mask_type\22: \22CAUSAL\22" in call or "CAUSAL" in call
