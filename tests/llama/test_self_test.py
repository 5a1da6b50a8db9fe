import dataclasses
import functools
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sa_jax.errors import UserError
from sa_jax.llama import blockwise, decode_kernel, self_test
from sa_jax.llama.attention import attention
from sa_jax.llama.kernels import block_sizes
from sa_jax.llama.self_test import (
    TOLERANCE,
    check_attention,
    compile_decode_check,
    decoding_takes_kernel,
    determinism,
)
from sa_jax.parallel.mesh import make_mesh
from tests.llama.sampling_toys import CONFIG


def sees_other_documents(q, k, v, ids, **how):
    return attention(q, k, v, ids * 0, **how)


def test_a_right_kernel_passes_on_a_mesh():
    errors = check_attention("blockwise", make_mesh(fsdp=4, tensor=2), "bfloat16", 8)
    assert errors.keys() == {"output", "queries", "keys", "values"}
    assert 0 < max(errors.values()) < 0.01


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_documents_of_the_self_test_cross_tiles(kind):
    length = self_test.LENGTHS["tpu"]
    tile = block_sizes(kind, length).block_q
    assert tile == block_sizes(kind, 4096).block_q and 3 * tile <= length  # as in training
    assert (21 + 2 * length // 5) % tile  # where the two long ones meet


def test_a_wrong_kernel_stops_the_run_with_both_numbers(monkeypatch):
    monkeypatch.setattr(self_test, "attention", sees_other_documents)
    words = r"its output has \S+ where the reference has \S+, \S+ of the largest.*self_test=False"
    with pytest.raises(UserError, match=words):
        check_attention("blockwise", make_mesh(fsdp=4, tensor=2), "float32", 8)


ONE, OTHER = "--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops"


@pytest.mark.parametrize(
    ("implementation", "flags", "devices", "algorithm", "words"),
    [
        ("cudnn", "--xla_dump_to=/x", 1, "", "^not bit .*XLA_FLAGS='--xla_gpu_deterministic_ops"),
        ("cudnn", f"{ONE}=false", 1, "", "^not bit .*XLA_FLAGS='--xla_gpu_deterministic_ops"),
        ("cudnn", f"{ONE}=true", 1, "", "^the same .*cuDNN may need memory .* square"),
        ("blockwise", ONE, 1, "", "^the same bit for bit when repeated or resumed$"),
        ("blockwise", f"{OTHER}=true --x=1", 1, "", "^the same .* resumed$"),
        ("blockwise", f"{OTHER}=false", 1, "", "^not bit"),
        ("blockwise", ONE, 8, "", "^not bit .*set NCCL_ALGO=Ring$"),
        ("blockwise", ONE, 8, "Ring", "^the same .* resumed$"),
        ("blockwise", ONE, 8, "^NVLS", "^not bit"),  # NVLSTree adds up in the switches too
    ],
)
def test_what_a_run_says_of_repeating(
    implementation, flags, devices, algorithm, words, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("NCCL_ALGO", algorithm)
    assert re.search(words, determinism(implementation, devices))


DECODING = {"heads": 4, "head_dim": 16, "block": 16}


def test_the_kernel_of_decoding_passes_its_check(interpreted_kernel):
    for dtype, limit in (("float32", 1e-6), ("bfloat16", 0.01)):
        mesh = make_mesh(data=2, fsdp=2, tensor=2)
        assert 0 < compile_decode_check(mesh, dtype, **DECODING)() < limit


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("jnp.where(is_past_t[None], scores_nt, MASKED_SCORE)", "scores_nt"),
        ("k_ref[layer, i, row, head]", "k_ref[0, i, row, head]"),
        ("k_ref[layer, i, row, head]", "k_ref[layer, i, row, 0]"),
        ("v_ref[layer, i, row, head]", "v_ref[layer, i, 0, head]"),
        ("v_ref[layer, i, row, head]", "v_ref[layer, turn, row, head]"),
        ("total * shrink +", "total +"),
        ("out * shrink[..., None] +", "out +"),
        ("out * shrink[..., None] +", ""),
        ("* h**-0.5", ""),
        ("< start\n", "<= start\n"),
        ("pl.cdiv(start, block)", "start // block"),
        ("out_zbgrh * shrink_zbgr[..., None]", "out_zbgrh"),
    ],
)
def test_a_wrong_kernel_of_decoding_does_not_pass(monkeypatch, right, wrong):
    """The module, with what it takes from another, and one place changed, compiled anew."""
    source = inspect.getsource(decode_kernel) + inspect.getsource(blockwise.add_keys)
    assert source.count(right) == 1
    broken: dict = {"__name__": decode_kernel.__name__, "Callable": Callable}
    exec(compile(source.replace(right, wrong), "broken", "exec"), broken)
    broken["_on_device"] = functools.partial(broken["_on_device"], interpret=True)
    monkeypatch.setattr(self_test, "attend_to_past", broken["attend_to_past"])
    error = compile_decode_check(make_mesh(data=4, tensor=2), "bfloat16", **DECODING)()
    assert not error <= 2 * TOLERANCE


class Gpus:
    """A mesh, as far as the decision looks at it."""

    devices = np.asarray([SimpleNamespace(platform="gpu")])


def fails(*arguments):
    raise RuntimeError("PTX: sm_200 is unknown\nmore")


@pytest.mark.parametrize(
    ("compiled", "head_dim", "warning"),
    [
        (lambda *at: lambda: 0.004, 128, ""),
        (lambda *at: lambda: 0.04, 128, "slower: it differs by 0.04 of a row's largest"),
        (lambda *at: lambda: float("nan"), 128, "it differs by nan"),
        (fails, 128, "slower: PTX: sm_200 is unknown$"),
        (fails, 96, None),  # not the kernel's sizes: not even tried
    ],
)
def test_decoding_does_without_a_kernel_that_fails(
    monkeypatch, warnings, compiled, head_dim, warning
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(self_test, "compile_decode_check", compiled)
    mesh = Gpus()
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    takes = [decoding_takes_kernel(mesh, config, "bfloat16", 64) for _ in range(2)]
    assert takes == [warning == ""] * 2
    assert len(warnings) == bool(warning)  # once, however many samplers ask
    assert not warning or re.search(warning, warnings[0])


def test_plans_take_the_kernel_and_other_devices_do_not():
    gpu = Gpus()
    config = dataclasses.replace(CONFIG, head_dim=128)
    assert decoding_takes_kernel(gpu, config, "bfloat16", 64)
    assert not decoding_takes_kernel(gpu, config, "bfloat16", 40)
    assert not decoding_takes_kernel(make_mesh(), config, "bfloat16", 64)


def test_a_jax_without_triton_decodes_without_the_kernel():
    code = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None
from sa_jax.llama.decode_kernel import kernel_takes
print(kernel_takes(128, 64))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
