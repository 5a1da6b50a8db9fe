import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sa_jax.errors import UserError
from sa_jax.llama import decode_kernel, self_test
from sa_jax.llama.attention import attention
from sa_jax.llama.self_test import (
    TOLERANCE,
    check_attention,
    decode_kernel_error,
    decoding_takes_kernel,
    determinism,
)
from sa_jax.parallel.mesh import make_mesh


def sees_other_documents(q, k, v, ids, **how):
    return attention(q, k, v, ids * 0, **how)


def test_a_right_kernel_passes_on_a_mesh():
    errors = check_attention("blockwise", make_mesh(fsdp=4, tensor=2), "bfloat16", 8)
    assert errors.keys() == {"output", "queries", "keys", "values"}
    assert 0 < max(errors.values()) < 0.01


def test_a_wrong_kernel_stops_the_run_with_both_numbers(monkeypatch):
    monkeypatch.setattr(self_test, "attention", sees_other_documents)
    words = r"its output has \S+ where the reference has \S+, \S+ of the largest.*self_test=False"
    with pytest.raises(UserError, match=words):
        check_attention("blockwise", make_mesh(fsdp=4, tensor=2), "float32", 8)


@pytest.mark.parametrize(
    ("implementation", "flags", "cudnn", "words"),
    [
        ("cudnn", "--xla_dump_to=/x", 92500, "not bit for bit"),
        ("cudnn", "--xla_gpu_deterministic_ops=false", 92500, "not bit for bit"),
        ("cudnn", "--xla_gpu_deterministic_ops=true", 91000, "cuDNN before 9.25"),
        ("cudnn", "--xla_gpu_deterministic_ops=true", 92500, "^deterministic: the same"),
        ("blockwise", "--xla_gpu_deterministic_ops", None, "^deterministic: the same"),
    ],
)
def test_what_a_run_says_of_repeating(implementation, flags, cudnn, words, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert re.search(words, determinism(implementation, cudnn))


def test_the_error_of_decoding_s_kernel(interpreted_kernel):
    assert 0 < decode_kernel_error(make_mesh(data=2, fsdp=2, tensor=2), "bfloat16", 16) < 0.01


def test_a_wrong_kernel_of_decoding_shows(monkeypatch, interpreted_kernel):
    right = decode_kernel._on_device
    one_more = lambda q, cache, layer, start: right(q, cache, layer, start + 1)  # noqa: E731
    monkeypatch.setattr(decode_kernel, "_on_device", one_more)
    assert decode_kernel_error(make_mesh(data=4, tensor=2), "bfloat16", 16) > 10 * TOLERANCE


def fails(*arguments):
    raise RuntimeError("PTX: sm_200 is unknown\nmore")


@pytest.mark.parametrize(
    ("error", "head_dim", "taken", "warning"),
    [
        (lambda *at: 0.004, 128, True, None),
        (lambda *at: 0.04, 128, False, r"slower: it differs by 0.04 of the largest"),
        (lambda *at: float("nan"), 128, False, r"it differs by nan"),
        (fails, 128, False, r"slower: PTX: sm_200 is unknown$"),
        (fails, 96, False, None),  # not the kernel's sizes: not even tried
    ],
)
def test_decoding_without_its_kernel_says_why(monkeypatch, caplog, error, head_dim, taken, warning):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(self_test, "decode_kernel_error", error)
    mesh = SimpleNamespace(devices=np.asarray([SimpleNamespace(platform="gpu")]))
    assert decoding_takes_kernel(mesh, "bfloat16", head_dim, 64) == taken
    (warned,) = [record.getMessage() for record in caplog.records] or [None]
    assert (warned is None) == (warning is None)
    assert warning is None or re.search(warning, warned)


def test_plans_take_the_kernel_and_other_devices_do_not():
    gpu = SimpleNamespace(devices=np.asarray([SimpleNamespace(platform="gpu")]))
    assert decoding_takes_kernel(gpu, "bfloat16", 128, 64)
    assert not decoding_takes_kernel(make_mesh(), "bfloat16", 128, 64)
