import math

import jax
import pytest

from sa_jax.errors import UserError
from sa_jax.parallel import self_test
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.self_test import check_collectives


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 3, "tensor": 2}]
)
def test_right_collectives_pass_on_any_mesh(sizes):
    check_collectives(make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())]), {})


@pytest.mark.parametrize(
    ("name", "words"), [("w_dn", ": 4 products.* and 0 "), ("g_bn", ": 0 products.* and 256 ")]
)
def test_one_wrong_number_stops_the_run(name, words, monkeypatch):
    """Of the 64 rows, 4 meet a row of the weights; a row meets 256 of the 4,096 weights' rows."""
    calls = []

    def patterns(mesh):
        right = exact(mesh)
        calls.append(name)
        if len(calls) == 1:
            return right
        return right | {name: right[name].at[16, 0].add(1)}

    exact = self_test._patterns
    monkeypatch.setattr(self_test, "_patterns", patterns)
    with pytest.raises(UserError, match=words):
        check_collectives(make_mesh(fsdp=8), {})
