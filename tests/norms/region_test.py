from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.norms import (
    layer_norm,
    region_attention_map,
    region_norm,
    region_norm_basic,
    region_norm_learnable,
)

AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "region_norm.npz")
LEARNABLE = tuple(
    f"sa.{name}"
    for name in (
        "conv1.weight",
        "gamma_conv.weight",
        "gamma_conv.bias",
        "beta_conv.weight",
        "beta_conv.bias",
    )
)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
instance_norm = partial(layer_norm, axis=(1, 2), epsilon=1e-5)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, size=shape).astype(np.float32)


def random_mask(shape, seed=0):
    return np.random.default_rng(seed).random(shape) < 0.6


def learnable_arguments(x):
    kernel, gain, shift = (random((3, 3, n, 1), i) / 9 for i, n in enumerate((2, 1, 1)))
    return (x - 1, kernel, gain, random(1, 3), shift, random(1, 4))


def region_norm64(x, labels, num_regions, epsilon, per_sample):
    """Region by region, image by image and channel by channel."""
    x = np.asarray(x, np.float64)
    y = np.zeros_like(x)
    for images in [[i] for i in range(len(x))] if per_sample else [list(range(len(x)))]:
        for region in range(num_regions):
            for channel in range(x.shape[-1]):
                pixels = [
                    (i, r, c) for i in images for r, c in np.argwhere(labels[i, :, :, 0] == region)
                ]
                if pixels:
                    values = np.array([x[(*pixel, channel)] for pixel in pixels])
                    unit = (values - values.mean()) / np.sqrt(values.var() + epsilon)
                    for pixel, value in zip(pixels, unit):
                        y[(*pixel, channel)] = value
    return y


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(True, False)
    def test_matches_a_loop_over_the_regions(self, per_sample):
        x = random((2, 3, 4, 2))
        labels = np.random.default_rng(1).integers(0, 4, size=(2, 3, 4, 1))  # one in no region
        ours = self.variant(partial(region_norm, num_regions=3, per_sample=per_sample, epsilon=0.1))
        close(ours(x, labels), region_norm64(x, labels, 3, 0.1, per_sample))

    def test_basic_form_and_its_gradients_match_the_authors_code(self):
        """They add both regions' biases at every pixel."""
        names = ("foreground_gamma", "foreground_beta", "background_gamma", "background_beta")
        gain, bias, other_gain, other_bias = (AUTHORS[f"basic_{name}"] for name in names)
        both = bias + other_bias
        norm = jax.jit(
            lambda x, *a: region_norm_basic(x, AUTHORS["mask"], *a, per_sample=False, epsilon=1e-12)
        )
        y, vjp = jax.vjp(norm, AUTHORS["x"], gain, both, other_gain, both)
        close(y, AUTHORS["basic_y"])
        dx, dgain, dboth, dother_gain, dother_both = vjp(AUTHORS["cotangent"])
        close(dx, AUTHORS["basic_grad_x"])
        close(dgain, AUTHORS["basic_grad_foreground_gamma"])
        close(dother_gain, AUTHORS["basic_grad_background_gamma"])
        close(dboth + dother_both, AUTHORS["basic_grad_foreground_beta"])

    def test_learnable_form_and_its_gradients_match_the_authors_code(self):
        parameters = [AUTHORS[f"learnable_{name}"] for name in LEARNABLE]
        norm = jax.jit(
            partial(region_norm_learnable, threshold=0.6, per_sample=False, epsilon=1e-12)
        )
        y, vjp = jax.vjp(norm, AUTHORS["x"], *parameters)
        close(y, AUTHORS["learnable_y"])
        dx, *gradients = vjp(AUTHORS["cotangent"])
        close(dx, AUTHORS["learnable_grad_x"])
        for name, gradient in zip(LEARNABLE, gradients):
            close(gradient, AUTHORS[f"learnable_grad_{name}"])
        close(region_attention_map(AUTHORS["x"], parameters[0]), AUTHORS["learnable_map"])


class TestClaims:
    @pytest.mark.claim("region-normalization")
    def test_a_growing_hole_shifts_the_valid_pixels_of_instance_norm_only(self):
        image, norm = random((1, 8, 8, 3)), jax.jit(region_norm_basic)
        shifts, others = [], []
        for size in (1, 3, 5, 7):
            mask = np.ones((1, 8, 8, 1), bool)
            mask[:, :size, :size] = False
            corrupted = np.where(mask, image, -8)
            ours = norm(corrupted, mask)
            valid = mask[0, :, :, 0]
            np.testing.assert_allclose(ours[0, valid].mean(0), 0, atol=1e-5)
            np.testing.assert_allclose(ours[0, valid].std(0), 1, rtol=1e-4)
            np.testing.assert_array_equal(ours[0, ~valid], 0)
            refilled = norm(np.where(mask, image, random(image.shape, 1)), mask)
            np.testing.assert_array_equal(refilled[0, valid], ours[0, valid])
            shifts.append(np.abs(instance_norm(corrupted)[0, valid].mean(0)).min())
            others.append(np.abs(ours[0, valid].mean(0)).max())
        assert np.all(np.diff(shifts) > 0.1)
        assert shifts[-1] > 0.8
        assert max(others) < 1e-5

    def test_one_region_is_instance_norm_or_batch_norm(self):
        x = random((2, 4, 4, 3))
        for mask in (np.ones((1, 1, 1, 1), bool), np.zeros((1, 1, 1, 1), bool)):
            close(region_norm_basic(x, mask), instance_norm(x))
            batch = layer_norm(x, axis=(0, 1, 2), epsilon=1e-5)
            close(region_norm_basic(x, mask, per_sample=False), batch)

    def test_regions_may_be_scaled_and_shifted_each(self):
        x, mask = random((2, 4, 4, 3)), random_mask((2, 4, 4, 1))
        norm = partial(region_norm_basic, mask=mask, epsilon=0.0)
        close(norm(np.where(mask, 3 * x - 1, 20 * x + 5)), norm(x))

    def test_regions_carry_no_gradient(self):
        """With no gain and no bias that depend on the map, its kernel learns nothing."""
        x, kernel, gain, gain_bias, shift, shift_bias = learnable_arguments(random((2, 4, 4, 3)))

        @jax.jit
        @jax.grad
        def slope(kernel, gain, shift):
            y = region_norm_learnable(x, kernel, gain, gain_bias, shift, shift_bias)
            return jnp.sum(y**3)

        assert np.all(slope(kernel, 0 * gain, 0 * shift) == 0)
        assert np.any(slope(kernel, gain, 0 * shift) != 0)


class TestMask:
    def test_of_another_size_is_resized_to_nearest_neighbours(self):
        x, mask = random((2, 3, 6, 2)), random_mask((1, 5, 3, 1))
        rows, columns = [0, 1, 3], [0, 0, 1, 1, 2, 2]
        expected = region_norm_basic(x, np.broadcast_to(mask[:, rows][:, :, columns], (2, 3, 6, 1)))
        np.testing.assert_array_equal(region_norm_basic(x, mask), expected)
        np.testing.assert_array_equal(region_norm_basic(x, mask.astype("f")), expected)
        np.testing.assert_array_equal(region_norm_basic(x, mask.astype(int)), expected)

    def test_parameters_belong_to_one_region_each(self):
        x, mask = random((2, 3, 4, 2)), random_mask((2, 3, 4, 1))
        unit = region_norm_basic(x, mask)
        gain, shift, other_gain, other_shift = (random(2, i) for i in range(4))
        ours = region_norm_basic(x, mask, gain, shift, other_gain, other_shift)
        expected = np.where(mask, unit * (1 + gain) + shift, unit * (1 + other_gain) + other_shift)
        close(ours, expected)
        some = region_norm_basic(x, mask, background_scale=other_gain, foreground_bias=shift)
        close(some, np.where(mask, unit + shift, unit * (1 + other_gain)))


class TestTransformations:
    def test_vmap_and_sharded_images(self):
        x, mask = random((8, 4, 4, 2)), random_mask((8, 4, 4, 1))
        _, *parameters = learnable_arguments(x)
        learnable = lambda x: region_norm_learnable(x - 1, *parameters)
        place = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        for norm, arguments in ((region_norm_basic, (x, mask)), (learnable, (x,))):
            expected = jax.jit(norm)(*arguments)
            mapped = jax.jit(jax.vmap(lambda *a: norm(*(b[None] for b in a))[0]))
            close(mapped(*arguments), expected)
            ours = jax.jit(norm)(*jax.device_put(arguments, place))
            assert ours.sharding.is_equivalent_to(place, 4)
            close(ours, expected)


class TestEdges:
    def test_extreme_constant_and_empty_regions_stay_finite(self):
        def loss(x, mask, epsilon):
            _, *parameters = learnable_arguments(x)
            y = region_norm_basic(x, mask, epsilon=epsilon)
            return jnp.sum(y**2) + jnp.sum(region_norm_learnable(x, *parameters) ** 2)

        slope = jax.jit(jax.value_and_grad(loss), static_argnums=2)
        x = random((2, 3, 4, 2))
        one = np.zeros((2, 3, 4, 1), bool)
        one[0, 0, 0] = True
        for size in (0.0, 1e-15, 1e4):
            for mask in (one, ~one, one & False):
                for batch in (size * x, np.full_like(x, size)):
                    for epsilon in (0.0, 1e-5):
                        chex.assert_tree_all_finite(slope(batch.astype("f"), mask, epsilon))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, dtype):
        x, mask = jnp.asarray(300 * random((2, 3, 4, 2)), dtype), random_mask((2, 3, 4, 1))
        _, *parameters = learnable_arguments(np.zeros(1))
        for norm in (
            lambda x: region_norm(x, mask.astype(int)),
            lambda x: region_norm_basic(x, mask, np.ones(2, "f"), np.ones(2, "f")),
            lambda x: region_norm_learnable(x, *parameters),
            lambda x: region_attention_map(x, parameters[0]),
        ):
            ours = norm(x)
            assert ours.dtype == dtype
            np.testing.assert_array_equal(ours, norm(x.astype(jnp.float32)).astype(dtype))


X = np.ones((2, 3, 4, 2), np.float32)


@pytest.mark.parametrize(
    ("norm", "change", "error", "message"),
    [
        (region_norm, {"x": X[0]}, ValueError, r"x must have shape \[batch, height"),
        (region_norm, {"x": X.astype(int)}, TypeError, "x must have a floating-point"),
        (region_norm, {"region_labels": X[..., :1]}, TypeError, "region_labels must be integers"),
        (region_norm, {"region_labels": X.astype(int)}, ValueError, "region_labels must broadcast"),
        (region_norm, {"num_regions": 0}, ValueError, "num_regions"),
        (region_norm, {"epsilon": -1.0}, ValueError, "epsilon"),
        (region_norm_basic, {"mask": X}, ValueError, r"mask must have shape \[2 or 1, h, w, 1\]"),
        (region_norm_basic, {"mask": X[[0, 0, 0], ..., :1]}, ValueError, "mask must have shape"),
        (region_norm_basic, {"mask": X[0, ..., :1]}, ValueError, "mask must have shape"),
        (region_norm_basic, {"foreground_scale": X[0, 0, 0, :1]}, ValueError, "foreground_scale"),
        (region_norm_basic, {"background_bias": np.ones(2, int)}, TypeError, "background_bias"),
        (region_norm_learnable, {"threshold": 1.0}, ValueError, r"threshold must be in \(0, 1\)"),
        (region_norm_learnable, {"attention_kernel": X}, ValueError, "kernel must have shape"),
        (region_norm_learnable, {"bias_kernel": X}, ValueError, "bias_kernel must have shape"),
        (
            region_norm_learnable,
            {"scale_bias": X},
            ValueError,
            r"scale_bias must have shape \(1,\)",
        ),
        (region_attention_map, {"kernel": np.ones((3, 3, 2, 1), int)}, TypeError, "kernel"),
    ],
)
def test_bad_input_is_named(norm, change, error, message):
    names = ("attention_kernel", "scale_kernel", "scale_bias", "bias_kernel", "bias_bias")
    given = {
        region_norm: {"region_labels": np.zeros((2, 3, 4, 1), int)},
        region_norm_basic: {"mask": X[..., :1]},
        region_norm_learnable: dict(zip(names, learnable_arguments(X)[1:])),
        region_attention_map: {},
    }[norm]
    with pytest.raises(error, match=message):
        norm(**({"x": X} | given | change))
