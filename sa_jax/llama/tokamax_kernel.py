"""tokamax's flash attention over packed documents, a Pallas Mosaic kernel for Hopper GPUs."""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from sa_jax.errors import UsageError
from sa_jax.llama.cudnn import capability
from sa_jax.llama.on_devices import check_multiple, on_devices

# Its packed mask is no public API: 0.0.17 has another.
VERSION = "0.0.12"
LENGTH_MULTIPLE = 128  # queries of one block of the forward pass


def tokamax_attention(
    q_bskh: jax.Array,
    k_bsgh: jax.Array,
    v_bsgh: jax.Array,
    segment_ids_bs: jax.Array,
    mesh: Mesh,
) -> jax.Array:
    """`cudnn_attention` by tokamax, which gets the first key that each query sees ([B, S] integers)
    instead of a mask. It has the same arguments, result and errors; Hopper only."""
    check_tokamax(q_bskh.shape[1])
    local = functools.partial(_local, device=mesh.devices.flat[0])
    arrays = q_bskh, k_bsgh, v_bsgh, segment_ids_bs
    return on_devices(local, *arrays, mesh, check_vma=False)  # a kernel says nothing of axes


def first_keys(segment_ids_bs: jax.Array) -> jax.Array:
    """int32 [B, S]: where the document of each token starts; padding is a document."""
    new_bs = segment_ids_bs[:, 1:] != segment_ids_bs[:, :-1]
    new_bs = jnp.pad(new_bs, ((0, 0), (1, 0)))
    index_s = jnp.arange(segment_ids_bs.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(new_bs, index_s, 0), axis=1)


def check_tokamax(length: int) -> None:
    """UsageError unless the supported version of tokamax is installed, and takes such rows."""
    try:
        version = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version != VERSION:
        installed = f"and {version} is installed" if version else "which is not installed"
        raise UsageError(
            f"config.attention='tokamax' needs tokamax {VERSION}, {installed}: pip install "
            f"tokamax=={VERSION}, or use config.attention='cudnn'"
        )
    check_multiple("tokamax", length, LENGTH_MULTIPLE)


def _local(q_bskh, k_bsgh, v_bsgh, segment_ids_bs, *, device):
    from tokamax._src import gpu_utils
    from tokamax._src.ops.attention import api, base

    if capability(device)[0] != 9:
        raise UsageError(
            f"config.attention='tokamax' is for Hopper GPUs, and this is a {device.device_kind}; "
            "use config.attention='cudnn'"
        )
    if not flags.FLAGS.is_parsed():  # tokamax would read the arguments of any program as its flags
        flags.FLAGS(["tokamax"])
    mask = base.Mask(k_start=first_keys(segment_ids_bs)[:, None], is_causal=True)
    if jax.default_backend() != "gpu":
        # For a plan the GPU that is compiled for counts, not the machine that compiles. For good:
        # the backward pass asks when this call has returned.
        for name in ("is_sm90", "is_sm100", "has_mosaic_gpu_support"):
            setattr(gpu_utils, name, lambda *_, name=name: name != "is_sm100")
    return api.IMPLEMENTATIONS["mosaic_gpu"](q_bskh, k_bsgh, v_bsgh, mask=mask)
