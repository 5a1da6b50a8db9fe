"""What malloc is asked for, also of a glibc that takes less."""

import types

import pytest

from sa_jax import host_memory


@pytest.mark.parametrize("most", [1 << 30, 1 << 25])
def test_malloc_keeps_blocks_as_large_as_it_can(monkeypatch, most):
    taken = {}

    def mallopt(parameter, value):
        if parameter == -3 and value > most:
            return 0
        taken[parameter] = value
        return 1

    monkeypatch.setattr(
        host_memory.ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=mallopt)
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    host_memory.keep_freed_memory()
    assert taken == {-8: 1, -3: most, -1: (1 << 31) - 1}
