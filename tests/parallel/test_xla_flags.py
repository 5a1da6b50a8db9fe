"""Every option is accepted by the compiler that it is for, and says where it is from."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.errors import UsageError, UserError
from sa_jax.parallel import multihost
from sa_jax.parallel.hardware import CHIPS, chip_of
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.self_test import lower_collectives_check
from sa_jax.parallel.xla_flags import (
    TABLE,
    WITHOUT_SPARSE_CORES,
    check_options,
    compiler_options,
    parse_options,
)
from sa_jax.planning.topology import open_topology

BY_NAME = {chip.name: chip for chip in CHIPS}
TPUS = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}


def options_of(device):
    return compiler_options(device.platform, chip_of(device))


def options_of_tpu(name):
    return compiler_options("tpu", BY_NAME[name])


def compile_product(devices, options):
    mesh = Mesh(np.array(devices), ("x",))
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))
    return jax.jit(lambda x: x @ x.T, compiler_options=options).lower(x).compile()


@pytest.mark.parametrize("chip", TPUS)
def test_libtpu_accepts_the_options_of_a_generation(chip):
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    devices = open_topology(f"{chip}:{TPUS[chip]}").devices
    options = options_of(devices[0])
    assert options == options_of_tpu(chip) != {}
    compile_product(devices, options)


@pytest.mark.parametrize(
    ("topology", "sizes"),
    [
        ("v5p:2x2x2", {"fsdp": 8}),
        ("v5p:4x4x4", {"fsdp": 64}),
        ("v5p:2x2x2", {"fsdp": 4, "tensor": 2}),
        ("v6e:2x4", {"fsdp": 8}),
    ],
)
def test_sparse_cores_gather_weights_and_sum_gradients_in_parts(topology, sizes):
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    mesh = make_mesh(**sizes, devices=open_topology(topology).devices)
    table = options_of(mesh.devices.flat[0])

    def compiled(options):
        return lower_collectives_check(mesh, options).compile().as_text()

    text = compiled(table)
    assert text.count('async_execution_thread="sparsecore"') == 2
    assert len(re.findall(r" = bf16\[\S+ all-gather\(", text)) == 1
    assert len(re.findall(r" = bf16\[\S+ reduce-scatter\(", text)) == 1
    if topology == "v5p:2x2x2":
        assert "sparsecore" not in compiled(table | parse_options(WITHOUT_SPARSE_CORES))


def test_libtpu_refuses_what_it_does_not_know():
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    devices = open_topology("v5p:2x2x1").devices
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_no_such_thing"):
        compile_product(devices, {"xla_tpu_no_such_thing": True})


def test_xla_knows_the_options_of_gpus():
    """Also of those that are no topology. Every backend parses the fields; only a GPU's acts."""
    options = compiler_options("gpu", None)
    assert options == compiler_options("gpu", BY_NAME["h100"]) and options["xla_gpu_ftz"]
    compile_product(jax.devices(), options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_thing"):
        compile_product(jax.devices(), {"xla_gpu_no_such_thing": True})


def test_cpu_has_none_and_every_line_names_known_chips_and_a_source():
    assert options_of(jax.devices()[0]) == {}
    known = {"gpu", *TPUS}
    for chips, option, value, source in TABLE:
        assert set(chips) <= known and option.startswith("xla_") and source
        assert isinstance(value, bool | int)
    assert all(map(options_of_tpu, TPUS))
    # With it off libtpu 0.0.42 crashes on 8B for v4:2x2x4.
    option = "xla_jf_bf16_propagation"
    assert option not in options_of_tpu("v4")
    assert options_of_tpu("v5p")[option] is False


def test_a_product_without_a_kernel_names_the_flag_that_helps(monkeypatch):
    """As XLA of jax 0.12 says it where no GPU is there to ask cuBLAS; a run ends with the line."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    several = "INTERNAL: Failed to get configs for: 19 out of 19 instructions. See logs"
    one = "NOT_FOUND: No supported config found for HLO: %gemm_fusion_dot.34"
    words = "deterministic_ops=true', and config.xla_options.; add --xla_gpu_enable_triton_gemm=fa"
    for text in (several, one):
        with pytest.raises(UserError, match=words), multihost.joined():
            raise jax.errors.JaxRuntimeError(text)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"), multihost.joined():
        raise jax.errors.JaxRuntimeError("INTERNAL: another error")
    limit = "Please set the environment variable XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB to allocate"
    with pytest.raises(UserError, match="64 GB of the host's memory"), multihost.joined():
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: out of host memory. {limit}")


def test_a_persons_own_options_win_over_the_table():
    table = options_of_tpu("v5p")
    own = "--xla_jf_bf16_propagation=true xla_dump_to=a,b=c"
    assert compiler_options("tpu", BY_NAME["v5p"], own) == table | {
        "xla_jf_bf16_propagation": True,
        "xla_dump_to": "a,b=c",
    }
    assert compiler_options("cpu", None, own).keys() == {"xla_jf_bf16_propagation", "xla_dump_to"}


def test_libtpu_reads_a_persons_values():
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    mesh = Mesh(np.array(open_topology("v5p:2x2x1").devices), ("x",))
    check_options(mesh, "xla_jf_bf16_propagation=true xla_tpu_scoped_vmem_limit_kib=65536")
    with pytest.raises(UsageError, match="'7' into flag xla_jf_bf16_propagation"):
        check_options(mesh, "xla_jf_bf16_propagation=7")


@pytest.mark.parametrize(
    "own, words",
    [
        ("xla_nope=1", "'xla_nope=1'.*No such compile option"),
        ("xla_cpu_enable_fast_math=some", "xla_cpu_enable_fast_math"),
        ("xla_cpu_prefer_vector_width=--5", "xla_cpu_prefer_vector_width"),
        ("enable=1", "names that start with xla_"),
        ("xla_cpu_enable_fast_math", "name=value"),
    ],
)
def test_an_option_that_cannot_be_says_so(own, words):
    check_options(make_mesh(), "--xla_cpu_enable_fast_math=false xla_cpu_prefer_vector_width=128")
    with pytest.raises(UsageError, match=words):
        check_options(make_mesh(), own)
