"""The device mesh (data, fsdp, tensor), also over several slices, and checks of divisibility."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from sa_jax.errors import UsageError

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    slices: int = 1,
) -> Mesh:
    """A mesh over all devices; see `mesh_sizes` for its sizes.

    The outermost part of its axis `data` runs over the slices, so that only gradients use the slow
    links between slices. Slices of GPUs are groups of nodes.

    Axes are Auto: the partitioner propagates shardings (an Explicit mesh, jax.make_mesh's default,
    refuses linen's FSDP-sharded contractions). UsageError for sizes that do not multiply to the
    number of devices, or split a dimension of a TPU's torus, and for another number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(len(devices), data=data, fsdp=fsdp, tensor=tensor, slices=slices)
    kind = devices[0].device_kind
    # jax counts each node of GPUs as a slice.
    attached = len(set(map(_slice, devices)))
    if kind.startswith("TPU") and slices != attached:
        raise UsageError(
            f"config.mesh.slices={slices}, but there {'are' if attached > 1 else 'is'} "
            f"{attached} of {kind}: set config.mesh.slices={attached}"
        )
    within = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    by_slice = np.reshape(sorted(devices, key=_slice), (slices, -1)).tolist()
    may_split = kind in ("TPU v5 lite", "TPU v5e")  # as jax.make_mesh
    try:
        meshes = [
            mesh_utils.create_device_mesh(within, part, allow_split_physical_axes=may_split)
            for part in by_slice
        ]
    except NotImplementedError:
        # jax can split a dimension, but libtpu aborts on some collectives over such axes.
        raise UsageError(
            f"{_shown(sizes)} would split a dimension of the torus of {kind}: each axis "
            "must be a product of whole dimensions (4x4x4: 4, 16 or 64 devices)"
        ) from None
    return Mesh(np.concatenate(meshes), AXES, axis_types=(AxisType.Auto,) * 3)


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0)


def mixes_rows(sizes: Mapping[str, int]) -> bool:
    """Whether XLA gives devices of such a mesh one another's rows.

    Where `fsdp` and `tensor` have one size, and a batch has few tokens for its features, XLA sends
    rows over `fsdp` instead of weights. If rows lie over `data` too, it then swaps those of two
    devices: losses and gradients are wrong (jax 0.10.2 to 0.12, on CPUs, and by the compiled text
    on GPUs; tests/parallel/test_rules.py has a product that shows it).
    """
    return sizes["data"] > 1 and sizes["fsdp"] == sizes["tensor"] > 1


def check_rows(sizes: Mapping[str, int]) -> None:
    """UsageError for a mesh on which XLA would mix up rows."""
    if mixes_rows(sizes):
        raise UsageError(
            f"{_shown(dict(sizes))}: with copies of the weights (data or slices above 1), XLA "
            "mixes up rows where fsdp and tensor have one size; take other sizes, such as "
            f"fsdp={sizes['fsdp'] ** 2} tensor=1"
        )


def regroup(mesh: Mesh, tensor: int) -> Mesh | None:
    """The devices of a mesh, in its order, as groups of `tensor` that each have all weights.

    None if a group would take devices from two of the present copies of the weights, from two
    slices, or a part of a dimension of a TPU's torus (see `make_mesh`).
    """
    copies, fsdp, inner = mesh.devices.shape
    if fsdp * inner % tensor:
        return None
    groups = mesh.devices.reshape(copies * fsdp * inner // tensor, 1, tensor)
    if any(len(set(map(_slice, group.flat))) > 1 for group in groups):
        return None
    if groups.flat[0].device_kind.startswith("TPU"):
        coords = np.array([[device.coords for device in group.flat] for group in groups])
        lengths = np.ptp(coords, (0, 1)) + 1
        sides = np.ptp(coords, 1) + 1
        chips = [len({tuple(chip) for chip in group}) for group in coords]
        whole = (sides == 1) | (sides == lengths)
        if not whole.all() or (sides.prod(1) != chips).any():
            return None
    return Mesh(groups, AXES, axis_types=mesh.axis_types)


def mesh_sizes(
    devices: int, *, data: int = 1, fsdp: int = -1, tensor: int = 1, slices: int = 1
) -> dict[str, int]:
    """Sizes of the axes on so many devices, of all slices, by name; UsageError if these are not
    their product.

    Args:
      data, fsdp, tensor: sizes inside a slice; one of them may be -1 and takes what the others
        leave.
      slices: the number of slices, each with all weights; they lie along `data`.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    shown = _shown(sizes | ({"slices": slices} if slices > 1 else {}))
    if [*sizes.values()].count(-1) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UsageError(f"{shown}: sizes must be positive, and at most one may be -1")
    known = slices * math.prod(size for size in sizes.values() if size != -1)
    left = max(1, devices // known)
    sizes = {axis: left if size == -1 else size for axis, size in sizes.items()}
    sizes["data"] *= slices
    if math.prod(sizes.values()) != devices:
        wanted = f"the product must be {devices} (or set one axis to -1)"
        if -1 in (data, fsdp, tensor):
            wanted = f"{known} does not divide {devices}"
        raise UsageError(f"{shown} does not use {devices} devices: {wanted}")
    return sizes


def _shown(sizes: dict[str, int]) -> str:
    return "config.mesh " + " ".join(f"{axis}={size}" for axis, size in sizes.items())


def check_divisible(mesh: Mesh, axes: tuple[str, ...], total: int, what: str) -> None:
    """UsageError if `total` does not divide over the axes, naming the sizes that these devices can
    make and, for rows, the nearest numbers that would divide."""
    size = math.prod(mesh.shape[axis] for axis in axes)
    if total % size:
        shown, below = " x ".join(axes), total - total % size
        common = math.gcd(total, mesh.size)
        sizes = [str(d) for d in range(1, common + 1) if common % d == 0]
        nearest = " or ".join(str(rows) for rows in (below, below + size) if rows)
        raise UsageError(
            f"config.mesh: {total} {what} do not divide by {shown} = {size}; "
            f"{shown} may be {', '.join(sizes)} on these {mesh.size} devices"
            + (f", or take {nearest} rows" if what.startswith("rows") else "")
        )
