import jax
import numpy as np
import pytest

from jaxref.data import stratified_batches

batches_of = jax.jit(stratified_batches, static_argnums=1)


class TestStratifiedBatches:
    @pytest.mark.parametrize(("n", "size"), [(11, 4), (11, 11)])
    def test_batches_have_one_of_each_group(self, n, size):
        labels = np.random.default_rng(0).normal(size=n)
        batches = np.asarray(batches_of(labels, size, key=jax.random.key(0)))
        assert batches.dtype == np.int32
        assert batches.shape == (-(-n // size), size)
        for group, members in zip(np.array_split(np.argsort(labels), size), batches.T):
            padded = np.pad(group, (0, len(members) - len(group)), "edge")
            np.testing.assert_array_equal(np.sort(members), np.sort(padded))

    def test_another_key_is_another_order(self):
        labels = np.arange(11.0)
        first, again, other = (
            np.asarray(batches_of(labels, 4, key=jax.random.key(seed))) for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert np.mean(first != other) > 0.5
        assert not np.array_equal(
            np.argsort(first[:, 0]), np.argsort(first[:, 1])
        )  # each group by itself

    def test_bad_input_is_named(self):
        key = jax.random.key(0)
        with pytest.raises(ValueError, match="batch_size must be in"):
            stratified_batches(np.zeros(3), 4, key=key)
        with pytest.raises(ValueError, match="labels must have shape"):
            stratified_batches(np.zeros((3, 2)), 2, key=key)
