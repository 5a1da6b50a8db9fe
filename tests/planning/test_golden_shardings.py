"""Where every parameter and state leaf of 8B and 70B lives, on three meshes, against a file.

A change shows as a diff; SA_JAX_UPDATE_GOLDENS=1 writes the files anew.
"""

import math

import jax
import pytest

from sa_jax.config_files import load_config
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.rules import path_string
from sa_jax.training.plan import plan_architecture
from sa_jax.training.program import make_model, make_program
from tests.planning.golden import GOLDENS, held

MESHES = ((1, 8, 1), (1, 4, 2), (2, 1, 4))


def lines(config, sizes) -> list[str]:
    mesh = make_mesh(*sizes)
    program = make_program(config, make_model(config, plan_architecture(config), mesh), 100)
    state, frozen, _ = program.arguments
    leaves = jax.tree_util.tree_leaves_with_path({"state": state, "frozen": frozen})
    found = ["mesh " + " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())]
    for path, leaf in leaves:
        shard = leaf.sharding.shard_shape(leaf.shape)
        spec = ", ".join(str(axes) for axes in leaf.sharding.spec)
        name = f"{path_string(path):62} {leaf.dtype.name:8}"
        found.append(f"{name} {list(leaf.shape)} -> {list(shard)} ({spec})")
    total = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for _, leaf in leaves
    )
    return [*found, f"bytes a device {total}", ""]


@pytest.mark.parametrize("size", ["8b", "70b"])
@pytest.mark.parametrize("task", ["insertion", "removal"])
def test_every_leaf_is_where_the_golden_file_says(size, task):
    config = load_config(f"configs/llama.py:{size}_{task}")
    text = "\n".join(line for sizes in MESHES for line in lines(config, sizes))
    file = GOLDENS / f"llama_{size}_{task}_shardings.txt"
    assert text == held(file, text), f"{file} differs; SA_JAX_UPDATE_GOLDENS=1 rewrites it"
