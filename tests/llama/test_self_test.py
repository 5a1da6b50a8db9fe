import re

import pytest

from sa_jax.errors import UserError
from sa_jax.llama import self_test
from sa_jax.llama.attention import attention
from sa_jax.llama.self_test import check_attention, determinism
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
