import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxref.parallel import MESH_AXES, make_mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": 8}, (8, 1, 1, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 1, 1, 2)),
        ({"tensor": 2, "data": 4}, (4, 1, 1, 1, 2)),
        ({"data": -1}, (8, 1, 1, 1, 1)),
        ({"data": -1, "tensor": 4}, (2, 1, 1, 1, 4)),
        ({"data": 2, "fsdp": -1, "tensor": 4}, (2, 1, 1, 1, 4)),
        ({"fsdp": np.int64(8)}, (1, 8, 1, 1, 1)),
        ({"expert": 2, "sequence": 4}, (1, 1, 2, 4, 1)),
    ],
)
def test_sizes(sizes, shape):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == MESH_AXES
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.devices.flat) == set(jax.devices())
    assert mesh.axis_types == (AxisType.Auto,) * 5


def test_neighbours_share_the_tensor_axis():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert [device.id for device in mesh.devices.flat] == list(range(8))


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """What a mesh asks of a device that a data-centre network connects to others."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


class TestSlices:
    # As they may come: neither slice after slice nor in the order of their numbers.
    devices = tuple(
        SliceDevice(i, slice_index=i % 2, process_index=i) for i in (3, 0, 1, 2, *range(4, 8))
    )

    @pytest.mark.parametrize(
        "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "tensor": 2}]
    )
    def test_data_goes_over_the_slices_first(self, sizes):
        mesh = make_mesh(sizes, self.devices)
        slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
        half = sizes["data"] // 2
        assert (slices[:half] == 0).all()
        assert (slices[half:] == 1).all()
        assert len(set(mesh.devices.flat)) == 8

    def test_no_other_axis_leaves_a_slice(self):
        with pytest.raises(ValueError, match=r"data=1 must be a multiple of the 2 slices"):
            make_mesh({"fsdp": 8}, self.devices)


def test_given_devices():
    devices = jax.devices()[4:6]
    mesh = make_mesh({"data": -1}, devices)
    assert list(mesh.devices.flat) == devices
    assert make_mesh({}, devices[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data=3 does not divide the 8 devices"),
        ({"data": 16}, "must be 8"),
        ({}, "must be 8"),
        ({"data": -1, "tensor": 3}, "data=-1 x tensor=3 does not divide the 8 devices"),
        ({"data": -1, "tensor": 16}, "must be 8"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 8, "tensor": 0}, "must be positive"),
        ({"data": -2}, "must be positive"),
        ({"model": 8}, r"no axis \['model'\]; its axes are \['data', 'fsdp', 'expert'"),
    ],
)
def test_sizes_that_do_not_fit_raise(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)


def test_size_that_is_no_integer_raises():
    with pytest.raises(TypeError, match="integer"):
        make_mesh({"data": 8.5})
