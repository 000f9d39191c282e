import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from jaxref.models import (
    PretextHead,
    ScatSimCLRConfig,
    jigsaw_permutations,
    jigsaw_pretext,
    rotation_pretext,
    scatsimclr_loss,
)
from jaxref.models.scatsimclr import NETWORKS, adaptive_average_pool
from jaxref.nn import scattering_channels, scattering_transform

PEER = np.load(Path(__file__).parents[1] / "oracles" / "scatsimclr.npz")
KEY = jax.random.key(0)
PERMUTATIONS = jigsaw_permutations(35)
loss = jax.jit(scatsimclr_loss)


def filled(make):
    """A module with normal numbers in it, which takes less time than its own initialisation."""
    module, rng = nnx.eval_shape(make), np.random.default_rng(1)
    draw = lambda v: np.asarray(0.05 * rng.normal(size=v.shape), v.dtype)
    nnx.update(module, jax.tree.map(draw, nnx.state(module)))
    return module


def same_parameters(model):
    """Draws what the peer's script does, in its order and layouts."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        value = rng.normal(size=shape) / np.sqrt(max(math.prod(shape[1:]), 1))
        return (value + (len(shape) == 1)).astype("f")

    def fill(layer):
        h, w, inputs, outputs = layer.conv.kernel.shape
        layer.conv.kernel[...] = draw(outputs, inputs, h, w).transpose(2, 3, 1, 0)
        layer.norm.scale[...], layer.norm.bias[...] = draw(outputs), draw(outputs)

    fill(model.stem)
    for block in model.blocks:
        fill(block.first)
        fill(block.second)
        if block.shortcut is not None:
            fill(block.shortcut)
    hidden = draw(2048, 2048).reshape(2048, 128, 4, 4)  # of channels before pixels
    model.hidden.kernel[...] = hidden.transpose(2, 3, 1, 0).reshape(2048, 2048)
    model.hidden.bias[...] = draw(2048)
    model.projection.kernel[...], model.projection.bias[...] = draw(16, 2048).T, draw(16)


class TestModel:
    def test_matches_the_release(self):
        config = ScatSimCLRConfig(image_shape=(10, 8, 2), J=1, L=2, num_blocks=8, projection_dim=16)
        model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
        zeros = lambda v: np.zeros(v.shape, v.dtype)
        nnx.update(model, jax.tree.map(zeros, nnx.state(model)))
        same_parameters(model)
        h, z = nnx.jit(lambda model, x: model(x))(model, PEER["images"])
        np.testing.assert_allclose(h[:, ::8], PEER["some_of_h"], rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(z, PEER["z"], rtol=1e-3, atol=2e-3)

    def test_networks_end_with_as_many_features_and_blocks_as_they_say(self):
        for blocks, (_, stages) in NETWORKS.items():
            assert sum(count for _, count in stages) == blocks
            assert stages[-1][0] == 128

    def test_pooling_of_any_size_matches_the_formula(self):
        x = np.random.default_rng(0).normal(size=(2, 5, 3, 2)).astype("f")
        ours = adaptive_average_pool(jnp.asarray(x), 4)
        for i, j in np.ndindex(4, 4):
            rows, columns = (
                slice(k * n // 4, math.ceil((k + 1) * n / 4)) for k, n in ((i, 5), (j, 3))
            )
            expected = x[:, rows, columns].mean((1, 2))
            np.testing.assert_allclose(ours[:, i, j], expected, rtol=1e-4, atol=1e-6)

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="num_blocks must be one of"):
            ScatSimCLRConfig(num_blocks=9)
        with pytest.raises(ValueError, match="L must be in"):
            ScatSimCLRConfig(L=0)
        with pytest.raises(ValueError, match="at least 2\\^J = 8 pixels a side"):
            ScatSimCLRConfig(image_shape=(4, 32, 3), J=3)
        with pytest.raises(ValueError, match=r"image_shape must be \(height, width, channels\)"):
            ScatSimCLRConfig(image_shape=(32, 32))
        model = nnx.eval_shape(lambda: ScatSimCLRConfig(num_blocks=8).build(rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match="images must have shape"):
            model(jnp.ones((1, 8, 8, 3)))


class TestClaims:
    @pytest.mark.claim("scatsimclr")
    def test_fixed_scattering_features_are_stable_and_tell_textures_apart(self):
        """They move far less than the pixels with a shift, bring no two images further apart, and a
        linear classifier on them knows the direction of stripes, which on pixels it does not."""
        assert 3 * scattering_channels(2, 16) == 867
        transform = jax.jit(partial(scattering_transform, J=3, L=4))
        rng = np.random.default_rng(0)
        rows, columns = np.mgrid[:16, :17]

        def stripes(n):
            angles = rng.integers(2, size=n)
            along = np.where(angles[:, None, None] == 0, rows, columns)
            phases = rng.uniform(0, 2 * np.pi, size=(n, 1, 1))
            return np.sin(1.2 * along + phases) + 0.5 * rng.normal(size=(n, 16, 17)), angles

        images, labels = stripes(120)
        unmoved, moved = (images[..., k : k + 16, None].astype("f") for k in (0, 1))
        features, shifted = transform(unmoved), transform(moved)
        norm = lambda v: np.sqrt(np.sum(np.square(v), axis=(1, 2, 3)))
        change = norm(shifted - features) / norm(features)
        assert change.mean() < 0.25 * (norm(moved - unmoved) / norm(unmoved)).mean()
        apart = norm(features[:60] - features[60:]) * 2**3  # pixels of the low resolution
        assert np.all(apart <= norm(unmoved[:60] - unmoved[60:]))

        def accuracy(x):
            x = np.asarray(x).reshape(120, -1)
            x = (x - x[:80].mean(0)) / x[:80].std()
            gram = x[:80] @ x[:80].T + 1.0 * np.eye(80)  # ridge regression
            scores = x[80:] @ x[:80].T @ np.linalg.solve(gram, 2.0 * labels[:80] - 1)
            return np.mean((scores > 0) == labels[80:])

        assert accuracy(features) > 0.95
        assert accuracy(unmoved) < 0.75


class TestPretext:
    def test_rotations_are_clockwise(self):
        images = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype("f")
        turned, labels = rotation_pretext(images)
        assert turned.shape == (2, 4, 5, 5, 3)
        for k in range(4):
            np.testing.assert_array_equal(turned[:, k], np.rot90(images, -k, axes=(1, 2)))
            assert np.all(labels[:, k] == k)
        with pytest.raises(ValueError, match=r"\[batch, size, size, channels\]"):
            rotation_pretext(images[:, :4])

    def test_tiles_are_in_the_order_of_the_permutation(self):
        permutations = PERMUTATIONS[:5]
        image = np.zeros((10, 11, 1), "f")  # tiles of 3 x 3, from 0, 4, 7 and from 0, 4, 8
        for tile, (row, column) in enumerate(np.ndindex(3, 3)):
            image[(0, 4, 7)[row] :, (0, 4, 8)[column] :] = tile
        jigsaw = jax.jit(lambda images: jigsaw_pretext(images, permutations, key=KEY))
        tiles, labels = jigsaw(np.tile(image, (6, 1, 1, 1)))
        assert tiles.shape == (6, 9, 10, 11, 1)
        assert len(np.unique(labels)) > 1
        expected = np.broadcast_to(permutations[labels][..., None, None], (6, 9, 10, 11))
        np.testing.assert_allclose(tiles[..., 0], expected, atol=1e-5)

    def test_permutations_are_far_apart(self):
        permutations = PERMUTATIONS
        np.testing.assert_array_equal(np.sort(permutations), np.tile(np.arange(9), (35, 1)))
        apart = np.sum(permutations[:, None] != permutations, axis=-1)[np.triu_indices(35, 1)]
        assert apart.min() >= 3  # as far as those of the released list, or further
        assert apart.mean() > 8.2285

    @pytest.mark.parametrize("task", ["rotation", "jigsaw"])
    def test_heads_match_the_formula(self, task):
        h = np.random.default_rng(0).normal(size=(2, 9, 2048)).astype("f")
        make = lambda: PretextHead(task, permutations=7, rngs=nnx.Rngs(0))
        if task == "jigsaw":  # twenty million parameters
            head, logits = nnx.eval_shape(lambda: (head := make(), head(h)))
            sizes = [layer.kernel.shape for layer in head.layers]
            assert sizes == [(2048, 512), (4608, 4096), (4096, 7)]
            assert logits.shape == (2, 7)
            return
        head = filled(make)
        logits, dropped = nnx.jit(lambda head: [head(h, key=key) for key in (None, KEY)])(head)
        x = h
        for i, layer in enumerate(head.layers):
            x = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
            x = np.maximum(x, 0) if i < 2 else x
        np.testing.assert_allclose(logits, x, rtol=1e-3, atol=1e-4)
        assert np.mean(np.abs(np.asarray(dropped) - x) > 1e-3) > 0.9

    def test_bad_input_is_named(self):
        images = jnp.ones((2, 9, 9, 1))
        with pytest.raises(ValueError, match="task must be 'rotation' or 'jigsaw'"):
            PretextHead("colour", rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="permutations must have the numbers 0 to 8"):
            jigsaw_pretext(images, np.ones((2, 9), int), key=KEY)
        with pytest.raises(ValueError, match=r"permutations must have shape \[orders, 9\]"):
            jigsaw_pretext(images, np.arange(9), key=KEY)
        with pytest.raises(ValueError, match="images must have shape"):
            jigsaw_pretext(images[:, :2], np.arange(9)[None], key=KEY)


class TestLoss:
    def test_matches_the_formula(self):
        rng = np.random.default_rng(0)
        z_a, z_b = rng.normal(size=(2, 4, 6))
        logits, labels = rng.normal(size=(4, 3, 5)), rng.integers(5, size=(4, 3))
        z = np.concatenate([z_a, z_b])
        z /= np.linalg.norm(z, axis=-1, keepdims=True)
        similarity = z @ z.T / 0.5
        others = np.where(np.eye(8, dtype=bool), -np.inf, similarity)
        positive = similarity[np.arange(8), (np.arange(8) + 4) % 8]
        contrastive = np.mean(np.log(np.exp(others).sum(-1)) - positive)
        own = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
        pretext = np.mean(np.log(np.exp(logits).sum(-1)) - own)
        ours = loss(*(v.astype("f") for v in (z_a, z_b, logits)), labels)
        np.testing.assert_allclose(ours, contrastive + 0.3 * pretext, rtol=1e-5)
        ours = loss(*(v.astype("f") for v in (z_a, z_b, logits)), labels, pretext_weight=0.0)
        np.testing.assert_allclose(ours, contrastive, rtol=1e-5)
        with pytest.raises(ValueError, match="pretext_weight must be in"):
            scatsimclr_loss(z_a, z_b, logits, labels, pretext_weight=-1.0)

    def test_equal_embeddings(self):
        z = jnp.ones((4, 6))
        ours = loss(z, z, jnp.zeros((4, 3, 5)), jnp.zeros((4, 3), int))
        np.testing.assert_allclose(ours, np.log(7) + 0.3 * np.log(5), rtol=1e-5)


def views(images, key):
    """Digits `[n, 8, 8, 1]` moved by up to a pixel, lighter or darker, with noise."""
    keys = jax.random.split(key, 3)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = jax.random.randint(keys[0], (len(images), 2), 0, 3)
    crop = lambda x, corner: jax.lax.dynamic_slice(x, (*corner, 0), (8, 8, 1))
    moved = jax.vmap(crop)(padded, corners)
    light = jax.random.uniform(keys[1], (len(images), 1, 1, 1), minval=0.6, maxval=1.4)
    return light * moved + 0.15 * jax.random.normal(keys[2], moved.shape)


@pytest.mark.slow
@pytest.mark.optimized
def test_views_and_rotations_teach_features_that_few_labels_are_enough_for():
    """60 batches of 32 digits without labels: a linear classifier of the features, of 100 labelled
    digits, is then better than of those that the scattering network began with, and the head tells
    how digits that it has not seen are turned."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype("f")
    order = np.random.default_rng(0).permutation(len(images))
    unlabelled, images, labels = (
        images[order[:600]],
        images[order[600:]],
        digits.target[order[600:]],
    )
    config = ScatSimCLRConfig(image_shape=(8, 8, 1), J=2, L=4, num_blocks=8, projection_dim=32)

    @nnx.jit
    def made():
        rngs = nnx.Rngs(0)
        return nnx.List([config.build(rngs=rngs), PretextHead("rotation", rngs=rngs)])

    @nnx.jit
    def step(modules, optimizer, batch, key):
        def objective(modules):
            encoder, head = modules
            keys = jax.random.split(key, 4)
            turned, turns = rotation_pretext(views(batch[:8], keys[2]))
            pairs = views(batch, keys[0]), views(batch, keys[1])
            h, z = encoder(jnp.concatenate([*pairs, turned.reshape(-1, 8, 8, 1)]))
            logits = head(h[64:], key=keys[3])
            return scatsimclr_loss(z[:32], z[32:64], logits, turns.ravel(), pretext_weight=0.3)

        optimizer.update(modules, nnx.grad(objective)(modules))

    @nnx.jit
    def read(modules, images):
        encoder, head = modules
        turned, turns = rotation_pretext(images[:64])
        told = head(encoder(turned.reshape(-1, 8, 8, 1))[0])
        return encoder(images)[0], jnp.mean(jnp.argmax(told, axis=-1) == turns.ravel())

    def accuracies(modules):
        modules.eval()
        h, turned = read(modules, images)
        h = (h - h[:100].mean(0)) / h[:100].std()
        gram = h @ h[:100].T / h.shape[1]  # ridge regression
        weights = np.linalg.solve(gram[:100] + 0.1 * np.eye(100), np.eye(10)[labels[:100]])
        modules.train()
        return np.mean(np.argmax(gram[100:] @ weights, axis=1) == labels[100:]), turned

    modules = made()
    before, _ = accuracies(modules)
    optimizer = nnx.Optimizer(modules, optax.adam(3e-4), wrt=nnx.Param)
    for i, key in enumerate(jax.random.split(jax.random.key(0), 60)):
        step(modules, optimizer, unlabelled[(32 * i + np.arange(32)) % 600], key)
    after, turned = accuracies(modules)
    assert after > before + 0.01
    assert turned > 0.4
