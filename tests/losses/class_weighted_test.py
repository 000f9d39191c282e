from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from sklearn.metrics import log_loss

from jaxref.losses import weighted_log_loss


def random_batch(n=16, classes=4):
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(classes), size=n).astype("f"), rng.integers(classes - 1, size=n)


class TestNumbers:
    @pytest.mark.parametrize("weights", [None, np.array([2, 1, 0.5, 7], "f")])
    def test_matches_scikit_learn_with_the_weights_of_each_class_shared_out(self, weights):
        p, labels = random_batch()  # the last class has no example
        shares = (np.ones(4) if weights is None else weights) / np.bincount(
            labels, minlength=4
        ).clip(1)
        expected = log_loss(labels, p, sample_weight=shares[labels], labels=range(4))
        loss = jax.jit(partial(weighted_log_loss, class_weights=weights))
        np.testing.assert_allclose(loss(p, labels), expected, rtol=1e-5)
        one_hot = np.eye(4, dtype="f")[labels]
        value, slope = jax.value_and_grad(loss)(p, one_hot)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        total = shares[labels].sum()
        by_hand = (1 - one_hot / p) * (shares[labels] / total)[:, None]  # through the renormalising
        np.testing.assert_allclose(slope, by_hand, rtol=1e-4, atol=1e-5)

    def test_masks_and_shards(self):
        p, labels = random_batch()
        where = np.arange(16) % 3 > 0
        poisoned = np.where(where[:, None], p, np.nan)
        weights = np.array([2, 1, 1, 1], "f")
        shares = weights / np.bincount(labels[where], minlength=4).clip(1)
        weights_of = shares[labels[where]]
        by_hand = log_loss(labels[where], p[where], sample_weight=weights_of, labels=range(4))

        def whole(p, labels, where, axis_name=None):
            return weighted_log_loss(
                p, labels, class_weights=weights, where=where, axis_name=axis_name
            )

        data = PartitionSpec("data")
        sharded = jax.shard_map(
            partial(whole, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(data,) * 3,
            out_specs=PartitionSpec(),
        )
        found, expected = (
            jax.jit(jax.value_and_grad(f))(poisoned, labels, where) for f in (sharded, whole)
        )
        np.testing.assert_allclose(expected[0], by_hand, rtol=1e-5)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)
        assert np.all(found[1][~where] == 0)


class TestEdges:
    def test_sure_empty_unknown_and_half_precision(self):
        p, labels = random_batch()
        wrong = np.eye(4, dtype="f")[(labels + 1) % 4]
        value, slope = jax.jit(jax.value_and_grad(weighted_log_loss))(wrong, labels)
        np.testing.assert_allclose(value, -np.log(1e-15), rtol=1e-4)
        assert np.all(np.isfinite(slope))
        assert np.isfinite(weighted_log_loss(wrong, labels, limit=0.0))
        assert weighted_log_loss(p[:0], labels[:0]) == 0
        only = np.array([0, 0, 0, 1], "f")
        assert weighted_log_loss(p, labels, class_weights=only) == 0
        assert np.isnan(weighted_log_loss(p, labels + 3))
        half = jnp.asarray(p, jnp.bfloat16)
        ours = weighted_log_loss(half, labels)
        assert ours.dtype == jnp.bfloat16
        assert ours == weighted_log_loss(half.astype("f"), labels).astype(jnp.bfloat16)

    def test_bad_input_is_named(self):
        p, labels = random_batch()
        for message, options in (
            ("limit must be in", {"limit": 0.5}),
            (r"class_weights must have shape \(4,\)", {"class_weights": np.ones(3, "f")}),
            ("class_weights must be in", {"class_weights": -np.ones(4, "f")}),
            ("where must broadcast", {"where": np.ones(3, bool)}),
        ):
            with pytest.raises(ValueError, match=message):
                weighted_log_loss(p, labels, **options)
        with pytest.raises(TypeError, match="probabilities must have a floating-point type"):
            weighted_log_loss(np.ones((16, 4), int), labels)
