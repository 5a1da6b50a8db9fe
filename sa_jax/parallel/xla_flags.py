"""XLA options of the training step for each kind of chip, each with its source.

They are passed to `jax.jit(compiler_options=…)`, not in LIBTPU_INIT_ARGS or XLA_FLAGS. So they
depend on the mesh that is compiled for, apply only to the step, and a plan uses them too. Options
in those variables still apply. If two places set the same option, `config.xla_options` wins over
this table, and this table over the variables.
"""

import os
import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.errors import UsageError, UserError
from sa_jax.parallel.hardware import Chip
from sa_jax.text import first_line

Options = dict[str, bool | int | str]

# benchmarks/xla_flags_library.py of https://github.com/AI-Hypercomputer/maxtext at e591f30, and
# which of its groups benchmarks/maxtext_{trillium,v5p}_model_configs.py take for dense Llamas.
_MAXTEXT = "MaxText benchmarks/xla_flags_library.py"
# `python scripts/plan.py` with and without it.
_OURS = "measured here by compiling"
# https://docs.jax.dev/en/latest/gpu_performance_tips.html
_JAX_GPU = "JAX documentation, GPU performance tips"

_TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
_GPUS = ("gpu",)  # all of them

# What lets SparseCores gather weights and sum gradients, and the options that turn it off.
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload"
_OFFLOADED = ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "nd_reduce_scatter")
WITHOUT_SPARSE_CORES = f"{_OFFLOAD}_all_gather=false {_OFFLOAD}_reduce_scatter=false"

# MaxText also sets xla_tpu_scoped_vmem_limit_kib=98304; it is left out, because libtpu 0.0.42 then
# aborts on the 70B step for v5p:4x4x4.
# (chips, option, value, source)
TABLE: tuple[tuple[tuple[str, ...], str, bool | int, str], ...] = (
    # All-gathers of weights overlap with products on v4 and v5e (CF_FOR_ALL_GATHER). MaxText sets
    # the two of v5e on all; libtpu 0.0.50 refuses them on the others: "might lead to … incorrect
    # results, hang".
    (_TPUS, "xla_tpu_enable_async_collective_fusion", True, _MAXTEXT),
    (("v5e",), "xla_tpu_enable_async_collective_fusion_fuse_all_gather", True, _MAXTEXT),
    (("v5e",), "xla_tpu_enable_async_collective_fusion_multiple_steps", True, _MAXTEXT),
    (_TPUS, "xla_tpu_overlap_compute_collective_tc", True, _MAXTEXT),
    (_TPUS, "xla_enable_async_all_gather", True, _MAXTEXT),
    # This pass moves the casts of float32 weights out of the loop over layers, so that a bfloat16
    # copy of the model exists during the whole step. Without the pass, libtpu 0.0.42 aborts
    # (color_count != 1, in its fused reduce-scatter) on 8B for v4:2x2x4 and v5p:2x2x4 with fsdp=8
    # tensor=2, but not with fsdp=16. So it stays on for v4, where the copy fits.
    (("v5e", "v5p", "v6e", "tpu7x"), "xla_jf_bf16_propagation", False, _OURS),
    # No windowed einsum: whole products of gathered weights instead of loops that multiply a chunk
    # and permute (docs/scale.md compares them); MaxText turns the loops off for Llamas on v6e. The
    # value is a size in MiB that no weight has.
    (("v5p", "v6e", "tpu7x"), "xla_jf_spmd_threshold_for_windowed_einsum_mib", 1_000_000, _OURS),
    # SparseCores gather weights and sum gradients while the matrix units compute, which otherwise
    # wait. tpu7x does so by default. MaxText calls four base options needed: three are below, and
    # xla_sc_disjoint_spmem=false can only be set in LIBTPU_INIT_ARGS. No TPU has run this here, so
    # a run first checks what SparseCores gather and sum (parallel/self_test.py).
    *((("v5p", "v6e"), f"{_OFFLOAD}_{kind}", True, _OURS) for kind in _OFFLOADED),
    (("v5p", "v6e"), "xla_tpu_use_tc_device_shape_on_sc", True, _MAXTEXT),
    (("v5p", "v6e"), "xla_sc_disable_megacore_partitioning", True, _MAXTEXT),
    (("v5p", "v6e"), "xla_sc_enable_instruction_fusion", False, _MAXTEXT),
    # Where fsdp is 64 or more on v5p, libtpu would gather by summing matrices padded with zeros.
    (("v5p", "v6e"), "xla_tpu_prefer_async_allgather_to_allreduce", True, _OURS),
    # The scheduler moves collectives away from the operations that wait for them.
    (_GPUS, "xla_gpu_enable_latency_hiding_scheduler", True, _JAX_GPU),
    (_GPUS, "xla_gpu_triton_gemm_any", True, _JAX_GPU),
    # The embedding's gradient: without this, XLA of jax 0.10.2 and 0.11.0 makes tokens that repeat,
    # as those of a chat template do, wait for one another; scatters took up to 2,000 times as long.
    (_GPUS, "xla_gpu_ftz", True, "https://github.com/jax-ml/jax/issues/38806"),
)


def compiler_options(platform: str, chip: Chip | None, overrides: str = "") -> Options:
    """Options for programs that run on a chip of a platform ('cpu', 'gpu' or 'tpu'; only of a TPU
    the chip must be known). `overrides` are options that win over the table, as `parse_options`
    reads them."""
    name = chip.name if platform == "tpu" and chip is not None else platform
    table = {option: value for chips, option, value, _ in TABLE if name in chips}
    return table | parse_options(overrides)


def parse_options(text: str) -> Options:
    """The options of `name=value name=value`, written as in XLA_FLAGS, with or without `--`;
    UsageError for a text of another form."""
    options: Options = {}
    for word in text.split():
        name, _, value = word.removeprefix("--").partition("=")
        if not name.startswith("xla_") or not value:
            raise UsageError(
                f"config.xla_options={text!r}: must be 'name=value name=value' with names that "
                "start with xla_, such as xla_jf_bf16_propagation=true"
            )
        # Of numbers the compiler reads the text; of booleans it knows none but Python's.
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def is_deterministic() -> bool:
    """Whether XLA_FLAGS ask for GPU programs that give the same bits each time.

    XLA then takes the first kernel that it knows for a product, instead of the fastest of several,
    and sums gradients of the embedding in a fixed order.
    """
    flag = r"--xla_gpu_(deterministic|exclude_nondeterministic)_ops(=true|=1)?(\s|$)"
    return re.search(flag, os.environ.get("XLA_FLAGS", "")) is not None


def missing_kernel(error: Exception) -> UserError | None:
    """What to do if XLA found no kernel for a product on a GPU, else None. With the flags of
    `is_deterministic`, XLA of jax 0.12 does without Triton's kernels; without a GPU it has no other
    for what it meant for Triton."""
    if not re.search("Failed to get configs for|No supported config found", str(error)):
        return None
    return UserError(
        "XLA has no kernel for a matrix product with these flags (XLA_FLAGS="
        f"{os.environ.get('XLA_FLAGS', '')!r}, and config.xla_options); add "
        "--xla_gpu_enable_triton_gemm=false to XLA_FLAGS"
    )


def check_options(mesh: Mesh, text: str) -> None:
    """UsageError if the compiler for the mesh does not know an option of `text`, or its value."""
    x = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    try:
        jax.jit(jnp.negative, compiler_options=parse_options(text)).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"config.xla_options={text!r}: {first_line(error)}") from None
