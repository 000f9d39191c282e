from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses
from jaxref.parallel import collectives

ROWS = PartitionSpec("data")


def embeddings(number=16, features=5, seed=0):
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(number, features))
    second = first + rng.normal(size=first.shape)
    return first.astype("f"), second.astype("f")


def unit(x):
    return np.float64(x) / np.linalg.norm(np.float64(x), axis=-1, keepdims=True)


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,))


def on_devices(loss, devices=8):
    """The loss of rows that are spread over devices, which share all but the two embeddings."""

    def sharded(first, second, *shared):
        return jax.shard_map(
            partial(loss, axis_name="data"),
            mesh=mesh_of(devices),
            in_specs=(ROWS, ROWS, *(PartitionSpec() for _ in shared)),
            out_specs=ROWS,
        )(first, second, *shared)

    return sharded


class TestSigmoid:
    def test_is_the_sum_of_binary_cross_entropies(self):
        image, text = embeddings()
        logits = 7.0 * unit(image) @ unit(text).T - 3
        found = losses.sigmoid_contrastive_loss(image, text, jnp.log(7.0), -3.0)
        expected = optax.sigmoid_binary_cross_entropy(logits, np.eye(16)).sum(axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_masks_choose_positives_and_pairs(self):
        image, text = embeddings()
        rng = np.random.default_rng(1)
        positive, where = rng.uniform(size=(2, 16, 16)) < [[[0.3]], [[0.6]]]
        logits = 2 * unit(image) @ unit(text).T + 0.5
        found = losses.sigmoid_contrastive_loss(
            image, text, jnp.log(2.0), 0.5, positive_mask=positive, where=where
        )
        pairs = optax.sigmoid_binary_cross_entropy(logits, positive)
        np.testing.assert_allclose(found, np.where(where, pairs, 0).sum(axis=1), rtol=1e-5)

    def test_start_is_that_of_orthogonal_pairs(self):
        x = np.eye(8, dtype="f")
        found = losses.sigmoid_contrastive_loss(x[:4], x[4:], *losses.siglip_init())
        np.testing.assert_allclose(
            found, np.log1p(np.exp(10)) + 3 * np.log1p(np.exp(-10)), rtol=1e-6
        )

    def test_sides_are_alike_and_blocks_add_up(self):
        image, text = embeddings()
        loss = partial(losses.sigmoid_contrastive_loss, log_temperature=1.0, bias=-2.0)
        whole = loss(image, text)
        np.testing.assert_allclose(loss(text, image).mean(), whole.mean(), rtol=1e-5)
        first = np.arange(16) < 6
        parts = loss(image, text, where=first) + loss(image, text, where=~first)
        np.testing.assert_allclose(parts, whole, rtol=1e-5)

    def test_masks_over_devices(self):
        image, text = embeddings()
        rng = np.random.default_rng(1)
        positive, where = rng.uniform(size=(2, 16, 16)) < [[[0.3]], [[0.6]]]
        masks = {"positive_mask": positive, "where": where}
        plain = losses.sigmoid_contrastive_loss(image, text, 1.0, -2.0, **masks)
        sharded = jax.shard_map(
            lambda x, y, masks: losses.sigmoid_contrastive_loss(
                x, y, 1.0, -2.0, axis_name="data", **masks
            ),
            mesh=mesh_of(8),
            in_specs=ROWS,
            out_specs=ROWS,
        )(image, text, masks)
        np.testing.assert_allclose(sharded, plain, rtol=1e-5)

    @pytest.mark.optimized
    @pytest.mark.claim("siglip")
    def test_a_device_needs_memory_for_one_block_however_many_there_are(self):
        """Value and gradient are those of one device, while texts travel and are never gathered."""
        rows, features = 256, 16
        block = 4 * rows * rows
        parameters = losses.siglip_init()
        temporary = {}
        for devices in (2, 8):
            image, text = embeddings(devices * rows, features)
            sharded = on_devices(losses.sigmoid_contrastive_loss, devices)

            def mean(*arguments, loss=sharded):
                return jnp.mean(loss(*arguments))

            gradient = jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2, 3)))
            compiled = gradient.lower(image, text, *parameters).compile()
            temporary[devices] = compiled.memory_analysis().temp_size_in_bytes
            sent = {}
            for c in collectives(compiled, mesh_of(devices)):
                sent[c.kind] = sent.get(c.kind, 0) + c.times * c.sent_bytes
            # texts to all others, forward and, but for the first step, which is the same, backward;
            # and their gradients all the way round
            steps = (devices - 1) + (devices - 2) + devices
            assert sent.pop("collective-permute") == steps * 4 * rows * features
            assert sum(sent.values()) < 100  # the mean and the gradients of t' and b
            plain = partial(mean, loss=losses.sigmoid_contrastive_loss)
            expected = jax.value_and_grad(plain, argnums=(0, 1, 2, 3))(image, text, *parameters)
            jax.tree.map(
                partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7),
                compiled(image, text, *parameters),
                expected,
            )
        assert temporary[8] < 1.1 * temporary[2]
        assert temporary[8] < 5 * block  # its rows with all texts are 8 blocks, all pairs 64


class TestSoftmax:
    def test_is_the_mean_of_two_cross_entropies(self):
        image, text = embeddings()
        logits = 7.0 * unit(image) @ unit(text).T
        found = losses.softmax_contrastive_loss(image, text, jnp.log(7.0))
        expected = [-np.diag(scipy.special.log_softmax(logits, axis=axis)) for axis in (0, 1)]
        np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-5)

    def test_one_pair(self):
        loss = partial(losses.softmax_contrastive_loss, log_temperature=3.0)
        value, gradient = jax.value_and_grad(lambda x: loss(x, -x)[0])(jnp.array([[3.0, 4.0]]))
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


class TestNtXent:
    def test_is_the_sum_over_all_other_views(self):
        a, b = embeddings(6)
        s = (z := unit(np.concatenate([a, b]))) @ z.T / 0.3
        expected = [
            np.log(sum(np.exp(s[i, k]) for k in range(12) if k != i)) - s[i, (i + 6) % 12]
            for i in range(12)
        ]
        found = losses.nt_xent_loss(a, b, temperature=0.3)
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_equal_views_and_one_example(self):
        same = jnp.ones((4, 3))
        np.testing.assert_allclose(losses.nt_xent_loss(same, same), np.log(7), rtol=1e-6)
        np.testing.assert_allclose(losses.nt_xent_loss(same[:1], -same[:1]), 0, atol=1e-6)


def nt_xent_of_examples(*views, **options):
    return losses.nt_xent_loss(*views, temperature=0.2, ring=True, **options).reshape(2, -1).T


@pytest.mark.parametrize(
    ("loss", "shared"),
    [
        (losses.sigmoid_contrastive_loss, (1.5, -2.0)),
        (losses.softmax_contrastive_loss, (1.5,)),
        (partial(losses.softmax_contrastive_loss, ring=True), (1.5,)),
        (nt_xent_of_examples, ()),
    ],
    ids=["sigmoid", "softmax gathered", "softmax ring", "nt_xent ring"],
)
def test_eight_devices_have_the_value_and_gradients_of_one(loss, shared):
    arguments = *embeddings(), *map(jnp.float32, shared)
    weights = 1 + jnp.arange(16) / 16  # a plain mean would have the same cotangent in all rows

    def value_and_gradients(loss):
        def weighted(*arguments):
            return jnp.mean(weights * loss(*arguments).T)

        return jax.jit(jax.value_and_grad(weighted, argnums=range(len(arguments))))(*arguments)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        value_and_gradients(on_devices(loss)),
        value_and_gradients(loss),
    )


class TestKeptNegatives:
    def test_hard_easy_and_random(self):
        rng = np.random.default_rng(0)
        s = rng.normal(size=(6, 9)).astype("f")
        negative = ~np.eye(6, 9, dtype=bool)
        for mode, sign in (("hard", -1), ("easy", 1)):
            kept = np.asarray(losses.kept_negatives(s, keep_fraction=0.5, mode=mode))
            assert np.all(kept | negative)
            for i in range(6):
                order = np.argsort(np.where(negative[i], sign * s[i], np.inf))
                np.testing.assert_array_equal(np.nonzero(kept[i])[0], sorted([*order[:4], i]))
        kept = losses.kept_negatives(s, keep_fraction=0.3, key=jax.random.key(0))
        np.testing.assert_array_equal(kept.sum(axis=1), 3)
        assert np.all(kept | negative)

    def test_bad_input(self):
        keep = partial(losses.kept_negatives, jnp.eye(3))
        with pytest.raises(ValueError, match="key must be given"):
            keep(keep_fraction=0.5)
        with pytest.raises(ValueError, match="mode must be 'random', 'hard' or 'easy', got 'soft'"):
            keep(keep_fraction=0.5, mode="soft")
        with pytest.raises(ValueError, match=r"keep_fraction must be in \[0, 1\], got 1.5"):
            keep(keep_fraction=1.5, mode="hard")


TWO_TOWERS = {
    "sigmoid": partial(losses.sigmoid_contrastive_loss, log_temperature=2.0, bias=-5.0),
    "softmax": partial(losses.softmax_contrastive_loss, log_temperature=2.0),
    "nt_xent": losses.nt_xent_loss,
}


@pytest.mark.parametrize("loss", TWO_TOWERS.values(), ids=TWO_TOWERS)
class TestEveryLoss:
    def test_zero_vectors_and_far_ones(self, loss):
        image, text = embeddings(4)
        image[1] = 0
        text[2] *= 1e18
        values, pull = jax.vjp(loss, image, text)
        gradients = pull(jnp.ones_like(values))
        for x in (values, *gradients):
            assert np.all(np.isfinite(x))
        np.testing.assert_array_equal(gradients[0][1], 0)
        text[2] /= 1e18
        np.testing.assert_allclose(loss(image, text), values, rtol=1e-5)

    def test_half_precision_computes_in_float32(self, loss):
        image, text = (jnp.asarray(x, jnp.bfloat16) for x in embeddings(4))
        found = loss(image, text)
        assert found.dtype == jnp.bfloat16
        expected = loss(image.astype("f"), text.astype("f")).astype(jnp.bfloat16)
        np.testing.assert_array_equal(found, expected)

    def test_bad_input(self, loss):
        image, text = embeddings(4)
        with pytest.raises(ValueError, match=r"must have shape \(4, 5\), got \(3, 5\)"):
            loss(image, text[:3])
        with pytest.raises(ValueError, match=r"must have shape \[batch, features\], got \(5,\)"):
            loss(image[0], text[0])
        with pytest.raises(TypeError, match="must have a floating-point type, got int"):
            loss(image.astype(int), text)
