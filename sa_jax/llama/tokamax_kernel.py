"""tokamax's flash attention over packed documents, a Pallas Mosaic kernel for Hopper GPUs."""

import importlib.metadata

import jax
import jax.numpy as jnp
from absl import flags

from sa_jax.errors import UsageError
from sa_jax.llama.cudnn import capability

# Its packed mask is no public API: 0.0.17 has another.
VERSION = "0.0.12"


def first_keys(segment_ids_bs: jax.Array) -> jax.Array:
    """int32 [B, S]: where the document of each token starts; padding is a document."""
    new_bs = segment_ids_bs[:, 1:] != segment_ids_bs[:, :-1]
    new_bs = jnp.pad(new_bs, ((0, 0), (1, 0)))
    index_s = jnp.arange(segment_ids_bs.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(new_bs, index_s, 0), axis=1)


def check_tokamax() -> None:
    """UsageError unless the supported version of tokamax is installed."""
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


def tokamax_attention(q_bskh, k_bsgh, v_bsgh, segment_ids_bs, *, device):
    """`attention` on one GPU by tokamax, which gets the first key that each query sees ([B, S]
    integers) instead of a mask; Hopper only."""
    check_tokamax()
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
