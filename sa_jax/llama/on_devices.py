"""What the attention kernels share: the rows and heads of each device, and lengths they take."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sa_jax.errors import UsageError
from sa_jax.parallel.mesh import check_divisible
from sa_jax.parallel.rules import BATCH_SPEC


def on_devices(
    local: Callable[..., jax.Array],
    q_bskh: jax.Array,
    k_bsgh: jax.Array,
    v_bsgh: jax.Array,
    segment_ids_bs: jax.Array,
    mesh: Mesh,
    *,
    check_vma: bool = True,
) -> jax.Array:
    """`local(q, k, v, segment_ids)` on each device's own rows and heads.

    Raises:
      UsageError: the mesh does not divide the rows or the key/value heads.
    """
    check_divisible(mesh, ("data", "fsdp"), q_bskh.shape[0], "rows of a batch")
    check_divisible(mesh, ("tensor",), k_bsgh.shape[2], "key/value heads")
    heads_spec, ids_spec = P(BATCH_SPEC[0], None, "tensor", None), P(BATCH_SPEC[0], None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads_spec, heads_spec, heads_spec, ids_spec),
        out_specs=heads_spec,
        check_vma=check_vma,
    )(q_bskh, k_bsgh, v_bsgh, segment_ids_bs)


def check_multiple(implementation: str, length: int, multiple: int, why: str = "") -> None:
    """UsageError unless a kernel takes rows of this length."""
    if length % multiple:
        raise UsageError(
            f"config.attention={implementation!r} needs a sequence length in multiples of "
            f"{multiple}, not {length}{why}; take {-(-length // multiple) * multiple}, or "
            "config.attention='blockwise'"
        )
