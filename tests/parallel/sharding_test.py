import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxref.parallel import (
    DEFAULT_RULES,
    constrain,
    logical_sharding,
    make_mesh,
    mapped_over,
    merge_rows,
    mesh_axes,
    on_shards,
    partition_spec,
    split_over,
    split_rows,
    use_rules,
)


@pytest.fixture
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


class TestPartitionSpec:
    @pytest.mark.parametrize(
        ("axes", "spec"),
        [
            (("batch", None, None), (("data", "fsdp"), None, None)),
            (("vocabulary", "embed"), ("tensor", "fsdp")),
            (("embed", "heads", None), ("fsdp", "tensor", None)),
            (("embed", "kv_heads", None), ("fsdp", "tensor", None)),
            (("heads", None, "embed"), ("tensor", None, "fsdp")),
            (("embed", "mlp"), ("fsdp", "tensor")),
            ((None, "embed"), (None, "fsdp")),
            (("unheard_of",), (None,)),
            ((), ()),
        ],
    )
    def test_default_rules(self, mesh, axes, spec):
        assert partition_spec(axes, (8,) * len(axes), mesh) == PartitionSpec(*spec)

    @pytest.mark.parametrize(
        ("axes", "spec"),
        [
            (("embed", "embed"), ("fsdp", None)),
            (("batch", "embed"), (("data", "fsdp"), None)),
            (("embed", "batch"), ("fsdp", "data")),
            (("mlp", "heads"), ("tensor", None)),
        ],
    )
    def test_a_mesh_axis_is_taken_once(self, mesh, axes, spec):
        assert partition_spec(axes, (8, 8), mesh) == PartitionSpec(*spec)

    def test_mesh_axes_of_size_one_are_left_out(self):
        mesh = make_mesh({"data": 4, "tensor": 2})
        assert partition_spec(("batch", "embed"), (4, 3), mesh) == PartitionSpec("data", None)
        single = make_mesh({"data": 1}, jax.devices()[:1])
        assert partition_spec(("batch", "embed"), (3, 3), single) == PartitionSpec(None, None)

    def test_rules_are_data(self, mesh):
        rules = {"embed": ("tensor", "data"), "mlp": ()}
        spec = partition_spec(("embed", "mlp", "heads"), (4, 4, 4), mesh, rules)
        assert spec == PartitionSpec(("tensor", "data"), None, None)
        extended = {**DEFAULT_RULES, "experts": ["data"]}
        assert partition_spec(("experts",), (4,), mesh, extended) == PartitionSpec("data")

    def test_a_merged_axis_is_split_over_the_axes_of_all_its_names(self, mesh):
        spec = partition_spec((("batch", "heads"), "embed"), (8, 8), mesh)
        assert spec == PartitionSpec(("data", "fsdp", "tensor"), None)
        assert mesh_axes(("batch", None, "mlp"), mesh) == ("data", "fsdp", "tensor")

    def test_a_mesh_without_an_axis_has_it_once(self):
        small = jax.make_mesh((2, 4), ("data", "tensor"))
        assert partition_spec(("batch", "embed"), (4, 3), small) == PartitionSpec("data", None)

    @pytest.mark.parametrize(
        ("axes", "shape", "rules", "message"),
        [
            (("batch",), (6,), DEFAULT_RULES, r"'batch' of size 6 .* 4 ways .*\['data', 'fsdp'\]"),
            (("embed", "heads"), (4, 3), DEFAULT_RULES, "'heads' .* multiple of 2, .* such as 1 "),
            (("batch",), (4, 4), DEFAULT_RULES, r"do not name the axes .* shape \(4, 4\)"),
            (("embed",), (4,), {"embed": ("model",)}, r"'embed' on mesh axes \('model',\)"),
            (("embed",), (4,), {"embed": "fsdp"}, "'embed' on mesh axes 'fsdp'"),
        ],
    )
    def test_what_does_not_fit_raises(self, mesh, axes, shape, rules, message):
        with pytest.raises(ValueError, match=message):
            partition_spec(axes, shape, mesh, rules)

    def test_logical_sharding_places_the_pieces(self, mesh):
        sharding = logical_sharding(("embed", "mlp"), (4, 6), mesh)
        x = jax.device_put(np.arange(24.0).reshape(4, 6), sharding)
        assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
        replicated = logical_sharding(("embed", "mlp"), (3, 5), mesh, rules={})
        assert replicated.is_fully_replicated


class TestConstrain:
    def test_is_the_identity_outside_use_rules(self):
        x = jnp.ones((3, 2))
        assert constrain(x, "batch", None) is x
        assert "sharding" not in lowered(lambda x: constrain(x, "batch", None), x)

    def test_on_one_device_it_costs_nothing(self):
        with use_rules(make_mesh({}, jax.devices()[:1])):
            assert "sharding" not in lowered(
                lambda x: constrain(x, "batch", None), jnp.ones((3, 2))
            )

    def test_fixes_the_sharding_within_use_rules(self, mesh):
        def double(x):
            with use_rules(mesh):
                return constrain(2 * x, "batch", "mlp")

        x = np.arange(32.0).reshape(8, 4)
        assert "sdy.sharding_constraint" in lowered(double, x)
        y = jax.jit(double)(x)
        assert y.sharding.is_equivalent_to(logical_sharding(("batch", "mlp"), (8, 4), mesh), 2)
        np.testing.assert_array_equal(y, 2 * x)
        gradient = jax.jit(jax.grad(lambda x: double(x).sum()))(x)
        np.testing.assert_array_equal(gradient, np.full((8, 4), 2.0))

    def test_rules_are_data(self, mesh):
        with use_rules(mesh, {"batch": ("tensor",)}):
            y = jax.jit(lambda x: constrain(x, "batch", None))(jnp.ones((8, 2)))
        assert y.sharding.spec == PartitionSpec("tensor")

    def test_contexts_nest_and_end_even_by_an_error(self, mesh):
        x = jnp.ones((6, 2))
        with use_rules(mesh, {}):
            with pytest.raises(ValueError, match="'batch' of size 6"), use_rules(mesh):
                constrain(x, "batch", None)
            constrain(x, "batch", None)  # the outer rules split nothing
        assert constrain(x, "batch", None) is x

    def test_a_wrong_number_of_names_raises(self, mesh):
        with use_rules(mesh), pytest.raises(ValueError, match="do not name the axes"):
            constrain(jnp.ones((8, 2)), "batch")


class TestOnShards:
    def test_each_device_computes_with_its_shards(self, mesh):
        shapes = []

        def product(x, w, nothing):
            shapes.append((x.shape, w.shape, nothing))
            return jax.lax.psum(x @ w, "tensor") if split_over("batch") else x @ w

        def model(x, w):
            with use_rules(mesh):
                assert split_over("batch") == ("data", "fsdp")
                over = split_over("mlp")

                def exchange(x, w, nothing):
                    assert split_over("batch") == ()  # here it is placed
                    return jax.lax.psum(product(x, w, nothing), over)

                spread = on_shards(exchange, [("batch", "mlp"), ("mlp", None), None], ("batch",))
                return spread(x, w, None)

        x, w = np.arange(32.0).reshape(8, 4), np.arange(12.0).reshape(4, 3)
        np.testing.assert_allclose(jax.jit(model)(x, w), x @ w)
        assert shapes[-1] == ((2, 2), (2, 3), None)
        gradient = jax.jit(jax.grad(lambda w: model(x, w).sum()))(w)
        np.testing.assert_allclose(gradient, np.tile(x.sum(axis=0)[:, None], 3))

    def test_the_result_may_be_a_tree(self, mesh):
        with use_rules(mesh):
            halves = on_shards(
                lambda x: {"sum": x.sum(axis=1), "x": x}, [("batch", None)], ("batch",)
            )
            result = jax.jit(halves)(np.ones((8, 3)))
        assert result["sum"].sharding.spec == PartitionSpec(("data", "fsdp"))
        np.testing.assert_array_equal(result["x"], np.ones((8, 3)))

    def test_without_rules_or_on_one_device_it_is_the_function(self):
        function = lambda x: x
        assert on_shards(function, [("batch",)], ("batch",)) is function
        with use_rules(make_mesh({}, jax.devices()[:1])):
            assert on_shards(function, [("batch",)], ("batch",)) is function

    def test_what_does_not_fit_raises(self, mesh):
        with use_rules(mesh), pytest.raises(ValueError, match="'batch' of size 6"):
            on_shards(lambda x: x, [("batch",)], ("batch",))(jnp.ones(6))

    def test_a_mapped_axis_is_left_to_vmap(self, mesh):
        def of_one(x):
            with mapped_over("data"):
                assert split_over("batch") == ("fsdp",)
                total = on_shards(lambda x: jax.lax.psum(x.sum(), "fsdp"), [("batch", None)], ())
                return total(constrain(x, "batch", None))

        def of_all(x):
            with use_rules(mesh):
                return jax.vmap(of_one, spmd_axis_name="data")(x)

        x = np.arange(24.0).reshape(2, 4, 3)
        np.testing.assert_allclose(jax.jit(of_all)(x), x.sum(axis=(1, 2)))
        with mapped_over("data"):
            assert split_over("batch") == ()


class TestRows:
    def test_they_are_in_order_where_the_length_is_whole(self, mesh):
        x = np.arange(24).reshape(4, 3, 2)
        with use_rules(mesh):
            np.testing.assert_array_equal(merge_rows(jnp.asarray(x)), x.reshape(12, 2))
            np.testing.assert_array_equal(split_rows(x.reshape(12, 2), (4, 3)), x)
        np.testing.assert_array_equal(merge_rows(jnp.asarray(x), 3), x.ravel())

    def test_each_device_keeps_its_own_where_the_length_is_split(self):
        mesh = make_mesh({"data": 2, "sequence": 4})
        x = np.arange(4 * 8 * 2).reshape(4, 8, 2)
        given = jax.device_put(x, logical_sharding(("batch", "length", None), x.shape, mesh))

        def merged(x):
            with use_rules(mesh):
                return merge_rows(x)

        def back(x):
            with use_rules(mesh):
                return split_rows(merge_rows(x), x.shape[:2])

        rows = jax.jit(merged)(given)
        for shard in rows.addressable_shards:
            [own] = [s for s in given.addressable_shards if s.device == shard.device]
            np.testing.assert_array_equal(shard.data, np.reshape(own.data, (-1, 2)))
        np.testing.assert_array_equal(jax.jit(back)(given), x)
        text = jax.jit(merged).lower(given).compile().as_text()
        for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
            assert f"{collective}(" not in text


def lowered(function, *args):
    return jax.jit(function).lower(*args).as_text()
