"""Device meshes with the axes data x fsdp x tensor."""

import collections

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from refusion_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: list | None = None) -> Mesh:
    """A mesh over all devices (or the given ones).

    Devices of several slices (TPU slices joined by a data-centre network) are laid out so that `data` crosses slices
    and `fsdp` x `tensor` stay inside one.

    Args:
      data, fsdp, tensor: sizes of the axes; one of them may be -1: whatever the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [data, fsdp, tensor]
    known = 1
    for size in shape:
        known *= size if size != -1 else 1
    if shape.count(-1) > 1 or min(shape) < -1 or 0 in shape:
        raise UserError(
            f"mesh {dict(zip(AXES, shape))} is not a shape: sizes are positive and at most one is -1 (the rest)."
        )
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = known = len(devices) // known
    if -1 in shape or shape[0] * shape[1] * shape[2] != len(devices):
        raise UserError(
            f"mesh {dict(zip(AXES, shape))} does not fit {len(devices)} devices: the axes must multiply to the number "
            "of devices. Change the mesh, or set one axis to -1."
        )
    slices = len(collections.Counter(getattr(d, "slice_index", 0) for d in devices))
    if slices > 1:
        if shape[0] % slices:
            raise UserError(
                f"mesh data axis {shape[0]} is not a multiple of the {slices} slices; data crosses slices, fsdp and "
                "tensor stay inside one."
            )
        inner = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(tuple(shape), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
