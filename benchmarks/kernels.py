"""A table of every attention kernel that a machine can run, against the float32 reference."""

import contextlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax.errors import UsageError, UserError
from sa_jax.llama.attention import attention, choose_attention
from sa_jax.llama.cache import CACHE_BLOCK
from sa_jax.llama.decode_kernel import kernel_takes
from sa_jax.llama.kernels import capability, check_tokamax, offsets_are_right
from sa_jax.llama.self_test import TOLERANCE, check_attention, compile_decode_check
from sa_jax.parallel.mesh import make_mesh
from sa_jax.text import first_line

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def compare_kernels(lengths: Sequence[int]) -> None:
    """Prints the table for rows of such lengths in bfloat16, then the self-test's verdict.

    Raises:
      UserError: a kernel differs by more than `TOLERANCE`.
    """
    device = jax.devices()[0]
    kernels = ["reference", "blockwise"]
    if device.platform == "gpu":
        kernels += ["cudnn", *["cudnn_packed"] * offsets_are_right()]
        with contextlib.suppress(UsageError):  # not installed
            check_tokamax()
            kernels += ["tokamax"] * (capability(device)[0] == 9)
    mesh = make_mesh(devices=[device])
    print(f"{device.device_kind}, jax {jax.__version__}\n")
    print(f"{'tokens':>7}  {'kernel':12}{'difference':>11}{'repeats':>9}{'ms':>10}")
    wrong = []
    for length in lengths:
        for kernel in kernels:
            error, repeats, ms = _check(length, kernel, mesh)
            print(f"{length:7}  {kernel:12}{error:11.2e}{repeats!s:>9}{ms:10.2f}", flush=True)
            if not error <= TOLERANCE or (kernel == "blockwise" and not repeats):
                wrong.append(f"{kernel} at {length} tokens")
    choice = choose_attention("auto", device.platform, sequence_length=512, dtype="bfloat16")
    check_attention(choice.implementation, mesh, "bfloat16", HEAD_DIM)
    print(f"\nself-test of {choice.implementation}: right")
    if device.platform == "gpu" and kernel_takes(HEAD_DIM, CACHE_BLOCK):
        heads = HEADS // KV_HEADS
        try:
            error = float(compile_decode_check(mesh, "bfloat16", heads, HEAD_DIM, CACHE_BLOCK)())
        except Exception as failure:  # whatever Triton raises; the other kernels are told of too
            error = float("nan")
            print(first_line(failure))
        print(f"decoding's kernel: difference {error:.2e}")
        if not error <= TOLERANCE:
            wrong.append("decoding's kernel")
    if wrong:
        raise UserError(f"beyond {TOLERANCE}: {', '.join(wrong)}")


def _step(implementation, mesh, arguments):
    """(output, gradients) of packed rows, compiled."""

    def run(q, k, v, g, ids):
        def attend(q, k, v):
            return attention(q, k, v, ids, implementation=implementation, mesh=mesh)

        out, back = jax.vjp(attend, q, k, v)
        return out, *back(g)

    return jax.jit(run).lower(*arguments).compile()


def _check(length, implementation, mesh):
    """(largest relative difference, repeats bit for bit, milliseconds)."""
    rng = np.random.default_rng(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((1, length, n, HEAD_DIM)), jnp.bfloat16) for n in heads
    )
    ids = jnp.asarray(np.repeat([1, 2, 3, 0], [1, length // 2, length // 4, length // 4 - 1])[None])
    floats = [x.astype(jnp.float32) for x in (q, k, v, g)]
    with jax.default_matmul_precision("highest"):
        oracle = _step("reference", mesh, (*floats, ids))(*floats, ids)
    run = _step(implementation, mesh, (q, k, v, g, ids))
    ours, again = run(q, k, v, g, ids), run(q, k, v, g, ids)
    repeats = all(bool(jnp.array_equal(a, b)) for a, b in zip(ours, again, strict=True))
    error = max(
        float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(ours, oracle, strict=True)
    )
    begin = time.perf_counter()
    jax.block_until_ready([run(q, k, v, g, ids) for _ in range(3)])
    return error, repeats, (time.perf_counter() - begin) / 3 * 1000
