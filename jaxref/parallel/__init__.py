"""Device meshes, logical axis names, rules from one to the other; what programs send."""

from jaxref.parallel.compiled import (
    Collective,
    collectives,
    flops,
    memory_traffic,
    sent_by_axes,
    uncounted_kernels,
)
from jaxref.parallel.mesh import MESH_AXES, make_mesh
from jaxref.parallel.sharding import (
    DEFAULT_RULES,
    constrain,
    logical_sharding,
    mapped_over,
    merge_rows,
    mesh_axes,
    on_shards,
    partition_spec,
    split_over,
    split_rows,
    use_rules,
)

__all__ = [
    "MESH_AXES",
    "make_mesh",
    "DEFAULT_RULES",
    "partition_spec",
    "mesh_axes",
    "logical_sharding",
    "use_rules",
    "mapped_over",
    "constrain",
    "split_over",
    "on_shards",
    "merge_rows",
    "split_rows",
    "Collective",
    "collectives",
    "sent_by_axes",
    "flops",
    "uncounted_kernels",
    "memory_traffic",
]
