"""The device mesh (data, fsdp, tensor), and the check that a size divides over its axes."""

import math

import jax
from jax.sharding import AxisType, Mesh

from sa_jax.errors import UsageError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave.

    Axes are Auto: the partitioner propagates shardings (an Explicit mesh, jax.make_mesh's
    default, refuses linen's FSDP-sharded contractions).

    Raises:
      UsageError: the sizes do not multiply to the number of devices, or split a dimension of a
        TPU's torus.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    shown = f"config.mesh data={data} fsdp={fsdp} tensor={tensor}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UsageError(f"{shown}: sizes must be positive, and at most one may be -1")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if math.prod(sizes) != len(devices):
        raise UsageError(
            f"{shown} does not use {len(devices)} devices: "
            f"the product must be {len(devices)} (or set one axis to -1)"
        )
    try:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError:
        # jax can split a dimension, but libtpu aborts on some collectives over such axes.
        raise UsageError(
            f"{shown} would split a dimension of the torus of {devices[0].device_kind}: each axis "
            "must be a product of whole dimensions (4x4x4: 4, 16 or 64 devices)"
        ) from None


def check_divisible(mesh: Mesh, axes: tuple[str, ...], total: int, what: str) -> None:
    """UsageError if `total` does not divide over the axes, naming the sizes that would."""
    size = math.prod(mesh.shape[axis] for axis in axes)
    if total % size:
        divisors = [d for d in range(1, 2 * size) if total % d == 0]
        raise UsageError(
            f"config.mesh: {' x '.join(axes)} = {size} does not divide {total} {what}; "
            f"sizes that do: {', '.join(map(str, divisors[-6:]))}"
        )
