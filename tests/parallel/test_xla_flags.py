"""Every option is accepted by the compiler that it is for, and says where it is from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.errors import UsageError
from sa_jax.parallel.hardware import CHIPS
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.xla_flags import TABLE, check_options, chip_options, compiler_options
from sa_jax.planning.topology import open_topology

TPUS = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}


def compile_product(devices, options):
    mesh = Mesh(np.array(devices), ("x",))
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))
    return jax.jit(lambda x: x @ x.T, compiler_options=options).lower(x).compile()


@pytest.mark.parametrize("chip", TPUS)
def test_libtpu_accepts_the_options_of_a_generation(chip):
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    devices = open_topology(f"{chip}:{TPUS[chip]}").devices
    assert compiler_options(devices[0]) == chip_options(chip) != {}
    compile_product(devices, chip_options(chip))


def test_libtpu_refuses_what_it_does_not_know():
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    devices = open_topology("v5p:2x2x1").devices
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_no_such_thing"):
        compile_product(devices, {"xla_tpu_no_such_thing": True})


@pytest.mark.parametrize("chip", ["h100", "h200", "b200"])
def test_xla_knows_the_options_of_gpus(chip):
    # They are fields of the options that every backend parses; only a GPU's acts on them.
    compile_product(jax.devices(), chip_options(chip))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_thing"):
        compile_product(jax.devices(), {"xla_gpu_no_such_thing": True})


def test_cpu_has_none_and_every_line_names_known_chips_and_a_source():
    assert compiler_options(jax.devices()[0]) == {}
    known = {chip.name for chip in CHIPS}
    for chips, option, value, source in TABLE:
        assert set(chips) <= known and option.startswith("xla_") and source
        assert isinstance(value, bool | int)
    assert all(chip_options(name) for name in known)


def test_a_persons_own_options_win_over_the_table():
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    device = open_topology("v5p:2x2x1").devices[0]
    own = "xla_jf_bf16_propagation=true, xla_tpu_scoped_vmem_limit_kib=65536,xla_word=some"
    assert compiler_options(device, own) == chip_options("v5p") | {
        "xla_jf_bf16_propagation": True,
        "xla_tpu_scoped_vmem_limit_kib": 65536,
        "xla_word": "some",
    }


@pytest.mark.parametrize(
    "own, words",
    [
        ("xla_nope=1", "'xla_nope=1'.*No such compile option"),
        ("xla_cpu_enable_fast_math=some", "xla_cpu_enable_fast_math"),
        ("enable=1", "names that start with xla_"),
        ("xla_cpu_enable_fast_math", "name=value"),
    ],
)
def test_an_option_that_cannot_be_says_so(own, words):
    check_options(make_mesh(), "xla_cpu_enable_fast_math=false")
    with pytest.raises(UsageError, match=words):
        check_options(make_mesh(), own)
