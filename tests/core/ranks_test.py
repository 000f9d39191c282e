import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxref.core.ranks import ascending_ranks


def test_ranks_of_the_admitted_entries_with_ties_in_order():
    values = np.array([[3.0, 1.0, np.nan], [1.0, 2.0, -5.0]], np.float32)
    where = np.array([[True, True, False], [True, True, False]])
    ranks, number = ascending_ranks(values, where=where)
    np.testing.assert_array_equal(ranks, [[3, 0, 4], [1, 2, 5]])
    assert number == 4


def test_ranks_over_shards_are_those_of_the_whole_set():
    rng = np.random.default_rng(0)
    values, where = rng.integers(9, size=16).astype("f"), rng.random(16) < 0.7
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    spread = P(("data", "fsdp"))
    ranks, number = jax.jit(
        jax.shard_map(
            lambda v, w: ascending_ranks(v, where=w, axis_name=("data", "fsdp")),
            mesh=mesh,
            in_specs=(spread, spread),
            out_specs=(spread, P()),
        )
    )(values, where)
    expected, count = ascending_ranks(values, where=where)
    np.testing.assert_array_equal(ranks, expected)
    assert number == count == where.sum()
