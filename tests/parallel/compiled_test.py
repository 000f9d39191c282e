import textwrap
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.parallel import make_mesh
from jaxref.parallel.compiled import (
    Collective,
    collectives,
    flops,
    memory_traffic,
    sent_by_axes,
    uncounted_kernels,
)
from tests.kernels.ahead_of_time import TOPOLOGIES, needs_tpu_compiler

pytestmark = pytest.mark.optimized


def written(text):
    """A program whose HLO is written by hand."""
    return textwrap.dedent(text).strip()


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "tensor": 4})


def compiled(function, *shapes):
    return jax.jit(function).lower(*shapes).compile()


def f32(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


class TestCollectives:
    def test_every_kind_by_hand(self, mesh):
        """Each of 8 x 16 floats, 512 bytes, on a device."""

        def every(x):
            total = lax.psum(x, "data")
            gathered = lax.all_gather(x, "tensor")
            scattered = lax.psum_scatter(gathered * 2, "tensor")
            turned = lax.all_to_all(x, "tensor", 0, 0, tiled=True)
            moved = lax.ppermute(total, "data", [(0, 1), (1, 0)])
            return scattered + turned + moved + lax.psum(x * 3, ("data", "tensor"))

        program = jax.shard_map(
            every, mesh=mesh, in_specs=P("data", "tensor"), out_specs=P("data", "tensor")
        )
        found = collectives(compiled(program, f32(16, 64)), mesh)
        assert sorted(found) == [
            Collective("all-gather", ("tensor",), 4, 512, 2048, 1536.0, 1),
            Collective("all-reduce", ("data",), 2, 512, 512, 512.0, 1),
            Collective("all-reduce", ("data", "tensor"), 8, 512, 512, 896.0, 1),
            Collective("all-to-all", ("tensor",), 4, 512, 512, 384.0, 1),
            Collective("collective-permute", ("data",), 2, 512, 512, 512.0, 1),
            Collective("reduce-scatter", ("tensor",), 4, 2048, 512, 1536.0, 1),
        ]

    def test_loops_multiply(self, mesh):
        """A ring of permutes in a loop of 5 in one of 3, whose body also sums."""

        def ring(x):
            def turn(x, _):
                return lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)]) + 1, None

            def outer(x, _):
                x, _ = lax.scan(turn, x, length=5)
                return lax.psum(jnp.sin(x), "data"), None

            return lax.scan(outer, x, length=3)[0]

        program = jax.shard_map(
            ring,
            mesh=mesh,
            in_specs=P(None, "tensor"),
            out_specs=P(None, "tensor"),
            check_vma=False,
        )
        found = {
            (one.kind, one.axes): (one.operand_bytes, one.times)
            for one in collectives(compiled(program, f32(2, 8)), mesh)
        }
        assert found == {
            ("collective-permute", ("tensor",)): (16, 15),
            ("all-reduce", ("data",)): (16, 3),
        }

    def test_products_partitioned_by_the_compiler(self, mesh):
        x = f32(64, 32, sharding=NamedSharding(mesh, P("data", "tensor")))
        w = f32(32, 16, sharding=NamedSharding(mesh, P("tensor", None)))
        program = compiled(jnp.matmul, x, w)
        (one,) = collectives(program, mesh)
        assert one == Collective("all-reduce", ("tensor",), 4, 2048, 2048, 3072.0, 1)
        assert flops(program) == 2 * 32 * 8 * 16
        assert sent_by_axes([one._replace(times=2)]) == {("tensor",): {"all-reduce": 6144.0}}

    @pytest.mark.parametrize(
        ("groups", "axes", "size"),
        [
            ("{{0,1,2,3},{4,5,6,7}}", ("tensor",), 4),
            ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
            ("{{0,2},{1,3},{4,6},{5,7}}", ("tensor",), 2),
            ("{}", ("data", "tensor"), 8),
            ("[2,4]<=[8]", ("tensor",), 4),
            ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
            ("[1,8]<=[8]", ("data", "tensor"), 8),
            ("mesh['a'=2,'b'=4] {'a'}", ("data",), 2),
            ("mesh['a'=2,'b'=4] {'b'}", ("tensor",), 4),
            ("mesh['a'=2,'b'=1,'c'=4] {'c','a'}", ("data", "tensor"), 8),
            ("mesh['a'=8] {'a':(1)2}", ("data",), 2),
            ("mesh['a'=8] {'a':(2)4}", ("tensor",), 4),
            ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",), 2),
            ("mesh['a'=2,'b'=4], device_ids=(0,4,1,5,2,6,3,7) {'a'}", ("tensor",), 2),
        ],
    )
    def test_notations_of_groups(self, mesh, groups, axes, size):
        program = written(f"""
            HloModule written, num_partitions=8

            ENTRY %main (x: bf16[8,5]) -> bf16[8,5] {{
              %x = bf16[8,5]{{1,0:T(8,128)(2,1)}} parameter(0)
              ROOT %sum = bf16[8,5]{{1,0}} all-reduce(%x), channel_id=1, \
                  replica_groups={groups}, to_apply=%add
            }}
            """)
        (one,) = collectives(program, mesh)
        assert one == Collective(
            "all-reduce", axes, size, 80, 80, pytest.approx(2 * (size - 1) / size * 80), 1
        )

    def test_forms_of_the_tpu_compiler(self, mesh):
        """Begun and ended apart; spread over fusions; a reduce-scatter as a fusion; a loop whose
        bound is in its condition; the worse branch."""
        program = written("""
            HloModule written, num_partitions=8

            %begin (p: f32[4]) -> (f32[4], f32[16], u32[]) {
              %p.1 = f32[4]{0:T(128)} parameter(0)
              %gather.1 = f32[16]{0} all-gather(%p.1), channel_id=2, replica_groups=[2,4]<=[8], \
                  frontend_attributes={chain_id="0"}, \
                  backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
              ROOT %call.1 = (f32[4]{0}, f32[16]{0}, u32[]{:S(2)}) custom-call(%gather.1), \
                  custom_call_target="AsyncCollectiveStart"
            }

            %async_collective_fusion (p: f32[4]) -> f32[4] {
              %p.2 = f32[4]{0:T(128)} parameter(0)
              %gather.2 = f32[16]{0} all-gather(%p.2), channel_id=2, replica_groups=[2,4]<=[8], \
                  frontend_attributes={chain_id="0"}, \
                  backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
              ROOT %twice = f32[4]{0} add(%p.2, %p.2)
            }

            %all-reduce-scatter (p: f32[16]) -> f32[4] {
              %p.3 = f32[16]{0} parameter(0)
              %sum.3 = f32[16]{0} all-reduce(%p.3), channel_id=3, \
                  replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
              %zero = u32[] constant(0)
              ROOT %part = f32[4]{0} dynamic-slice(%sum.3, %zero), dynamic_slice_sizes={4}
            }

            %cheap (p: f32[4]) -> f32[4] {
              %p.4 = f32[4]{0} parameter(0)
              ROOT %turn.4 = f32[4]{0} collective-permute(%p.4), channel_id=4, \
                  source_target_pairs={{0,4},{4,0}}
            }

            %dear (p: f32[4]) -> f32[4] {
              %p.5 = f32[4]{0} parameter(0)
              ROOT %sum.5 = f32[4]{0} all-reduce(%p.5), channel_id=5, replica_groups=[2,4]<=[8], \
                  to_apply=%add
            }

            %condition (p: (u32[], f32[4])) -> pred[] {
              %bound = u32[]{:T(128)} constant(16)
              %p.6 = (u32[]{:T(128)}, f32[4]{0:T(128)S(1)}) parameter(0)
              %i.6 = u32[]{:T(128)} get-tuple-element(%p.6), index=0
              ROOT %less = pred[]{:T(512)} compare(%i.6, %bound), direction=LT
            }

            %body (p: (u32[], f32[4])) -> (u32[], f32[4]) {
              %p.7 = (u32[]{:T(128)}, f32[4]{0:T(128)S(1)}) parameter(0)
              %i.7 = u32[]{:T(128)} get-tuple-element(%p.7), index=0
              %x.7 = f32[4]{0:T(128)S(1)} get-tuple-element(%p.7), index=1
              %one = u32[]{:T(128)} constant(1)
              %next = u32[] add(%i.7, %one)
              %after = u32[] add(%one, %next)
              %start.7 = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x.7), \
                  channel_id=6, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
              %done.7 = f32[4]{0} collective-permute-done(%start.7)
              ROOT %carry.7 = (u32[], f32[4]{0}) tuple(%after, %done.7)
            }

            ENTRY %main (x: f32[4], which: pred[]) -> f32[4] {
              %x = f32[4]{0:T(128)} parameter(0)
              %which = pred[] parameter(1)
              %begun = (f32[4]{0}, f32[16]{0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%begin
              %hidden = f32[4]{0} fusion(%x), kind=kOutput, calls=%async_collective_fusion
              %gathered = f32[16]{0} get-tuple-element(%begun), index=1
              %scattered = f32[4]{0} fusion(%gathered), kind=kCustom, calls=%all-reduce-scatter
              %four = u32[] constant(4)
              %init = (u32[], f32[4]{0}) tuple(%four, %scattered)
              %loop = (u32[], f32[4]{0}) while(%init), condition=%condition, body=%body
              %x.8 = f32[4]{0} get-tuple-element(%loop), index=1
              ROOT %chosen = f32[4]{0} conditional(%which, %x.8, %x.8), true_computation=%cheap, \
                  false_computation=%dear
            }
            """)
        assert sorted(collectives(program, mesh)) == [
            Collective("all-gather", ("tensor",), 4, 16, 64, 48.0, 1),
            Collective("all-reduce", ("tensor",), 4, 16, 16, 24.0, 1),
            Collective("collective-permute", ("tensor",), 2, 16, 16, 16.0, 6),
            Collective("reduce-scatter", ("tensor",), 4, 64, 16, 48.0, 1),
        ]

    def test_what_slices_send_each_other(self):
        """Two slices of four devices, the halves of "data"; the second half of it is links."""
        program = written("""
            HloModule written, num_partitions=4

            ENTRY %main (x: bf16[8,5]) -> bf16[8,5] {
              %x = bf16[8,5]{1,0} parameter(0)
              %after = token[] after-all()
              %sum = bf16[8,5]{1,0} all-reduce(%x), replica_groups={{0,2},{1,3}}, to_apply=%add
              %send = (bf16[8,5]{1,0}, u32[], token[]) send(%sum, %after), is_host_transfer=true, \
                  frontend_attributes={_xla_megascale_target="{1,2}x{0:3}", \
                  _xla_megascale_transfer_type="ALL_REDUCE"}
              %sent = token[] send-done(%send), is_host_transfer=true
              %recv = (bf16[8,5]{1,0}, u32[], token[]) recv(%after), is_host_transfer=true
              ROOT %done = (bf16[8,5]{1,0}, token[]) recv-done(%recv), is_host_transfer=true
            }
            """)
        devices = np.array([SimpleNamespace(slice_index=i // 4) for i in range(8)])
        mesh = SimpleNamespace(
            devices=devices.reshape(4, 2), axis_names=("data", "tensor"), size=devices.size
        )
        assert (
            collectives(program, mesh)
            == [Collective("all-reduce", ("data",), 2, 80, 80, 80.0, 1)] * 2
        )

    def test_another_mesh_is_refused(self, mesh):
        program = written("HloModule written, num_partitions=4\n\n%nothing")
        with pytest.raises(ValueError, match="8 devices in a slice, and the program is for 4"):
            collectives(program, mesh)


class TestFlops:
    def test_scans_multiply_and_the_dearest_branch_counts(self):
        def layers(x, weights):
            def layer(x, w):
                dear = lambda x: jnp.sin(x @ w @ w)
                return lax.cond(x.sum() > 0, dear, lambda x: x @ w, x), None

            return lax.scan(lambda x, _: (lax.scan(layer, x, weights)[0], None), x, length=3)[0]

        program = compiled(layers, f32(4, 8), f32(5, 8, 8))
        assert flops(program) == 3 * 5 * 2 * (2 * 4 * 8 * 8)

    def test_gradients_of_products_have_twice_their_operations(self):
        loss = lambda x, w: jnp.einsum("bik,bkj->bij", jnp.sin(x), w).sum()
        program = compiled(jax.value_and_grad(loss, (0, 1)), f32(3, 4, 8), f32(3, 8, 16))
        forward = 2 * 3 * 4 * 8 * 16
        assert flops(program) in (2 * forward, 3 * forward)  # the value may need no product

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"padding": [(1, 2), (0, 1)]},
            {"window_strides": (2, 1), "padding": [(1, 1), (2, 0)]},
            {"lhs_dilation": (2, 3), "padding": [(1, 0), (0, 0)]},
            {"rhs_dilation": (2, 1)},
            {"feature_group_count": 2},
        ],
    )
    def test_convolutions_count_what_is_there(self, options):
        """Ones convolved with ones sum to the products of each output."""
        given = {"window_strides": (1, 1), "padding": "VALID"} | options
        groups = given.get("feature_group_count", 1)
        convolve = partial(lax.conv_general_dilated, **given)
        x, w = jnp.ones((2, 4, 6, 5)), jnp.ones((6, 4 // groups, 3, 2))
        assert flops(compiled(convolve, x, w)) == 2 * convolve(x, w).sum()

    def test_kernels_declare_theirs(self):
        program = written("""
            HloModule written

            ENTRY %main (x: f32[4]) -> f32[4] {
              %x = f32[4]{0} parameter(0)
              %a.1 = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", \
                  backend_config={"custom_call_config":{"body":"(%","cost_estimate":{"bytes_accessed":"7","flops":"120"}}}
              ROOT %b.12 = f32[4]{0} custom-call(%a.1), custom_call_target="tpu_custom_call", \
                  backend_config={"custom_call_config":{"body":""}}
            }
            """)
        assert flops(program) == 120
        assert uncounted_kernels(program) == {"b": 1}


def test_memory_traffic_of_a_scan_reads_a_slice_a_step():
    layers = lambda x, weights: lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0]
    traffic = memory_traffic(compiled(layers, f32(4, 64), f32(10, 64, 64)))
    needed = 10 * 4 * (64 * 64 + 4 * 4 * 64)  # a matrix; read and write x twice
    assert needed <= traffic < 4 * needed  # and copies, where the CPU's compiler makes them


def test_memory_traffic_by_hand():
    """A copy into vector memory, 4000 bytes; the negative of a slice of a stack, 400 read, 400
    written and 4 of the index; an update in place, likewise; a sum over devices, 4000 read and
    written; and the 64 that a gather writes at its end."""
    program = written("""
        HloModule written

        %middle (p: f32[4], q: f32[16]) -> (f32[4], f32[16]) {
          %p.3 = f32[4]{0} parameter(0)
          %q.3 = f32[16]{0} parameter(1)
          %gather.3 = f32[16]{0} all-gather(%p.3), replica_groups=[2,4]<=[8], \
              backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
          ROOT %on = (f32[4]{0}, f32[16]{0}) tuple(%p.3, %gather.3)
        }

        %end (p: f32[4], q: f32[16]) -> f32[16] {
          %p.4 = f32[4]{0:S(1)} parameter(0)
          %q.4 = f32[16]{0:S(1)} parameter(1)
          ROOT %call.4 = f32[16]{0} custom-call(%p.4, %q.4), \
              custom_call_target="AsyncCollectiveDone"
        }

        %negate (p: f32[10,100], i: s32[]) -> f32[1,100] {
          %p.1 = f32[10,100]{1,0:T(8,128)} parameter(0)
          %i.1 = s32[]{:T(128)} parameter(1)
          %view = f32[10,100]{1,0} bitcast(%p.1)
          %slice = f32[1,100]{1,0} dynamic-slice(%view, %i.1, %i.1), dynamic_slice_sizes={1,100}
          ROOT %minus = f32[1,100]{1,0} negate(%slice)
        }

        %store (p: f32[10,100], u: f32[1,100], i: s32[]) -> f32[10,100] {
          %p.2 = f32[10,100]{1,0:T(8,128)} parameter(0)
          %u.2 = f32[1,100]{1,0:T(8,128)} parameter(1)
          %i.2 = s32[]{:T(128)} parameter(2)
          ROOT %stored = f32[10,100]{1,0} dynamic-update-slice(%p.2, %u.2, %i.2, %i.2)
        }

        ENTRY %main (x: f32[1000], stack: f32[10,100], i: s32[]) -> f32[10,100] {
          %x = f32[1000]{0:T(128)} parameter(0)
          %stack = f32[10,100]{1,0:T(8,128)} parameter(1)
          %i = s32[]{:T(128)} parameter(2)
          %copy.1 = (f32[1000]{0}, f32[1000]{0:T(128)S(1)}, u32[]{:S(2)}) copy-start(%x)
          %near = f32[1000]{0:T(128)S(1)} copy-done(%copy.1)
          %twice = f32[1000]{0:T(128)S(1)} add(%near, %near)
          %sum = f32[1000]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
          %few = f32[4]{0:S(1)} slice(%near), slice={[0:4]}
          %more = f32[16]{0:S(1)} slice(%near), slice={[0:16]}
          %between = (f32[4]{0}, f32[16]{0}) fusion(%few, %more), kind=kCustom, calls=%middle
          %all = f32[16]{0} fusion(%few, %more), kind=kCustom, calls=%end
          %part = f32[1,100]{1,0} fusion(%stack, %i), kind=kLoop, calls=%negate
          ROOT %out = f32[10,100]{1,0} fusion(%stack, %part, %i), kind=kLoop, calls=%store
        }
        """)
    assert memory_traffic(program) == 4000 + 2 * (400 + 400 + 4) + 2 * 4000 + 64


@needs_tpu_compiler
def test_a_program_of_the_tpu_compiler():
    """FSDP of a scan, in which each layer's matrix is gathered, forward and backward."""
    from jax.experimental import topologies
    from jax.sharding import Mesh

    devices = topologies.get_topology_desc(TOPOLOGIES["v5e"], platform="tpu").devices
    mesh = Mesh(np.array(devices), ("fsdp",))

    def loss(weights, x):
        return jnp.square(lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0]).sum()

    sharded = NamedSharding(mesh, P(None, "fsdp"))
    by_row = NamedSharding(mesh, P("fsdp"))
    step = jax.jit(jax.grad(loss), out_shardings=sharded)
    weights, x = f32(6, 256, 256, sharding=sharded), f32(512, 256, sharding=by_row)
    program = step.lower(weights, x).compile()
    assert flops(program) == pytest.approx(6 * 3 * 2 * 128 * 256 * 256, rel=0.06)
    ((axes, kinds),) = sent_by_axes(collectives(program, mesh)).items()
    assert axes == ("fsdp",)
    assert uncounted_kernels(program) == {}
    # the matrices are gathered once or twice, and their gradients summed, in bfloat16 or float32
    assert 6 * 3 / 4 * 256 * 256 * 2 * 2 <= sum(kinds.values()) <= 6 * 3 / 4 * 256 * 256 * 4 * 4
