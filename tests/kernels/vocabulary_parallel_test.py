from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxref.kernels.vocabulary_parallel import combine_over_vocabulary, local_ids, whole_width


def of_rows(logits, labels, axis_name=None):
    """log Z and the label's logit of rows whose columns are spread over an axis."""
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    shifted = jnp.where(top[:, None] > -jnp.inf, logits - top[:, None], -jnp.inf)
    total = jnp.exp(shifted).sum(axis=-1)
    ids, here = local_ids(labels, logits.shape[1], axis_name)
    of_label = jnp.where(here, jnp.take_along_axis(logits, ids[:, None], 1)[:, 0], 0)
    log_sum = jnp.log(jnp.where(total > 0, total, 1))
    top, log_sum, of_label = combine_over_vocabulary(top, log_sum, axis_name, of_label)
    return log_sum + top, of_label


def random_rows(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(5, 24)).astype(np.float32), np.array([0, 23, 7, 24, -1])


class TestCombine:
    @staticmethod
    def spread(function, mapped):
        """`function(logits, labels, "shard")` of eight shards of the columns."""
        if mapped == "vmap":

            def run(logits, labels):
                shards = jnp.stack(jnp.split(logits, 8, axis=1))
                each = partial(function, axis_name="shard")
                return [x[0] for x in jax.vmap(each, (0, None), axis_name="shard")(shards, labels)]

            return run
        mesh = jax.make_mesh((8,), ("shard",), axis_types=(AxisType.Auto,))
        return jax.shard_map(
            partial(function, axis_name="shard"),
            mesh=mesh,
            in_specs=(PartitionSpec(None, "shard"), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=mapped == "shard_map",
        )

    @pytest.mark.parametrize("mapped", ["shard_map", "shard_map unchecked", "vmap"])
    def test_rows_are_those_of_the_whole(self, mapped):
        logits, labels = random_rows()
        logits[0] += 1e4
        logits[1, :12] = -np.inf  # four shards have nothing of this row
        log_z, of_label = jax.jit(self.spread(of_rows, mapped))(logits, labels)
        expected = jax.scipy.special.logsumexp(logits, axis=1)
        np.testing.assert_allclose(log_z, expected, rtol=1e-6)
        np.testing.assert_array_equal(of_label[:3], logits[np.arange(3), labels[:3]])
        np.testing.assert_array_equal(of_label[3:], 0)

    @pytest.mark.parametrize("mapped", ["shard_map", "shard_map unchecked"])
    def test_gradients_are_those_of_the_whole(self, mapped):
        logits, labels = random_rows()
        spread = self.spread(of_rows, mapped)

        @jax.jit
        def gradient(logits):
            return jax.grad(lambda x: sum(jnp.sum(jnp.sin(y)) for y in spread(x, labels)))(logits)

        log_z = jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)
        expected = np.array(np.cos(log_z) * np.exp(logits - log_z))
        rows = np.arange(3)
        expected[rows, labels[:3]] += np.cos(logits[rows, labels[:3]])
        np.testing.assert_allclose(gradient(logits), expected, rtol=1e-5, atol=1e-6)

    def test_rows_without_any_class(self):
        def combined(top, log_sum):
            return combine_over_vocabulary(top, log_sum, "shard")

        nothing = jnp.full((2, 3), -jnp.inf), jnp.zeros((2, 3))
        top, log_sum = jax.vmap(combined, axis_name="shard")(*nothing)
        assert np.all(top == -np.inf)
        assert np.all(log_sum == 0)
        total = lambda x: jax.vmap(combined, axis_name="shard")(nothing[0], x)[1].sum()
        assert np.all(jax.grad(total)(nothing[1]) == 0)

    def test_nan_stays(self):
        top = jnp.array([[1.0], [jnp.nan]])
        _, log_sum = jax.vmap(
            lambda top: combine_over_vocabulary(top, jnp.zeros(1), "shard"), axis_name="shard"
        )(top)
        assert np.all(np.isnan(log_sum))

    def test_no_axis_is_no_exchange(self):
        top, log_sum, count = combine_over_vocabulary(jnp.ones(3), jnp.zeros(3), None, jnp.ones(3))
        np.testing.assert_array_equal((top, log_sum, count), [[1] * 3, [0] * 3, [1] * 3])


class TestLocalIds:
    def test_every_class_is_in_one_shard(self):
        labels = jnp.array([0, 99, 100, 255, 799, 800, -1, -(2**31), 2**31 - 1])
        shards = lambda _: local_ids(labels, 100, "shard")
        ids, here = jax.vmap(shards, axis_name="shard")(jnp.arange(8))
        np.testing.assert_array_equal(here.sum(axis=0), [1, 1, 1, 1, 1, 0, 0, 0, 0])
        np.testing.assert_array_equal(here.argmax(axis=0)[:5], [0, 0, 1, 2, 7])
        np.testing.assert_array_equal(ids.sum(axis=0)[:5], [0, 99, 0, 55, 99])
        assert np.all((ids >= 0) & (ids < 100))

    def test_small_types_reach_far_shards(self):
        labels = jnp.array([120, -1], jnp.int8)
        shards = lambda _: local_ids(labels, 100, "shard")
        ids, here = jax.vmap(shards, axis_name="shard")(jnp.arange(4))
        np.testing.assert_array_equal(here[:, 0], [False, True, False, False])
        assert ids[1, 0] == 20
        assert not here[:, 1].any()

    def test_several_axes(self):
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        spec = PartitionSpec(("a", "b"))

        def numbers(x):
            axes = ("a", "b")
            ids, here = local_ids(jnp.array([10, 15]), 2, axes)
            return x + jnp.where(here, ids, 0).sum() + 10 * here.sum() + 100 * whole_width(2, axes)

        ours = jax.jit(jax.shard_map(numbers, mesh=mesh, in_specs=spec, out_specs=spec))
        np.testing.assert_array_equal(
            ours(jnp.zeros(8, int)), 1600 + np.array([0] * 5 + [10, 0, 11])
        )
