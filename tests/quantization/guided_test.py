import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from absl.testing import parameterized

from jaxref.quantization import (
    LNQTensor,
    QuantSpec,
    dequantize,
    gptq_quantize,
    guided_gptq,
    guided_hessian,
    guided_objective,
    lnq_dequantize,
    lnq_quantize,
)
from jaxref.quantization.guided import update_codebook, update_codes, weighted_k_means

codebook_step = jax.jit(update_codebook)
codes_step = jax.jit(update_codes)
k_means = jax.jit(weighted_k_means, static_argnums=2)


def random_layer(inputs=12, outputs=6, tokens=50, seed=0):
    """Inputs of a few strong directions, gradients of unequal size, and a kernel."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, 3)) @ rng.normal(size=(3, inputs))
    x += 0.3 * rng.normal(size=(tokens, inputs))
    g = rng.normal(size=(tokens, outputs)) * np.exp(rng.normal(size=outputs))
    w = rng.normal(size=(inputs, outputs))
    return tuple(a.astype(np.float32) for a in (x, g, w))


def codebook64(w, h, codes, values):
    """Least squares for each output."""
    root = np.linalg.cholesky(h.astype(np.float64)).T
    levels = [
        np.linalg.lstsq(root @ np.eye(values)[codes[:, j]], root @ w[:, j], rcond=None)[0]
        for j in range(w.shape[1])
    ]
    return np.stack(levels, axis=1)


def codes64(w, h, codes, codebook, cycles):
    """Coordinate descent by plain loops."""
    w, h, codes = w.astype(np.float64), h.astype(np.float64), codes.copy()
    for j in range(w.shape[1]):
        for _ in range(cycles):
            for i in range(len(w)):
                rounded = codebook[codes[:, j], j]
                others = h[i] @ (rounded - w[:, j]) - h[i, i] * (rounded[i] - w[i, j])
                target = w[i, j] - others / h[i, i]
                codes[i, j] = np.argmin(np.abs(target - codebook[:, j]))
    return codes


def objectives(w, q, h):
    return np.einsum("ij,ik,kj->j", w - q, h, w - q, dtype=np.float64)


def network(seed=0):
    """A network of two layers whose labels are drawn from its own outputs: trained to perfection.

    Half of the tokens, as those of a prompt, have inputs in directions of their own and no part in
    the loss. Returns inputs, first kernel, gradients of the mean loss with respect to the first
    layer's outputs, and the mean loss over all labels as a function of the first kernel.
    """
    rng = np.random.default_rng(seed)
    x, _, w = random_layer(inputs=12, outputs=16, tokens=512, seed=seed)
    x[256:] = 2 * random_layer(inputs=12, outputs=16, tokens=256, seed=seed + 100)[0]
    second = rng.normal(size=(16, 4)) * np.exp(rng.normal(size=(16, 1)))

    def log_probabilities(z):
        return jax.nn.log_softmax(jax.nn.relu(z[:256]) @ second.astype(np.float32) / 8)

    labels = jax.random.categorical(jax.random.key(seed), log_probabilities(x @ w))

    def sampled_loss(z):
        return -jnp.take_along_axis(log_probabilities(z), labels[:, None], axis=1).mean()

    probabilities = jnp.exp(log_probabilities(x @ w))

    def loss(w):
        return -jnp.sum(probabilities * log_probabilities(x @ w), axis=-1).mean()

    return x, w, jax.jit(jax.grad(sampled_loss))(x @ w), jax.jit(loss)


class TestNumbers(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_objective_is_the_sum_over_tokens_and_outputs(self):
        x, g, w = random_layer()
        q = np.round(w)
        objective = self.variant(
            lambda x, g, w, q: guided_objective(w, q, guided_hessian(x, g, num_groups=6))
        )(x.reshape(5, 10, -1), g.reshape(5, 10, -1), w, q)
        np.testing.assert_allclose(objective, np.sum((g * (x @ (w - q))) ** 2), rtol=1e-5)

    def test_groups_are_consecutive_and_averaged(self):
        x, g, _ = random_layer()
        h = guided_hessian(x, g, num_groups=3)
        blocks = guided_hessian(x, g, num_groups=6)
        np.testing.assert_allclose(h, (blocks[::2] + blocks[1::2]) / 2, rtol=1e-4, atol=1e-3)
        same = guided_hessian(x, np.full_like(g, 3.0))
        np.testing.assert_allclose(same[0], 9 * x.T @ x, rtol=1e-4, atol=1e-3)
        doubled = guided_hessian(np.stack([x, x]), np.stack([g, g]), num_groups=3)
        np.testing.assert_allclose(doubled, 2 * h, rtol=1e-4)

    def test_codebook_is_least_squares(self):
        x, _, w = random_layer()
        h = x.T @ x
        codes, codebook = k_means(w, np.diagonal(h), 4)
        got = codebook_step(w, h, codes, codebook, 1e-7)
        np.testing.assert_allclose(got, codebook64(w, h, codes, 4), atol=1e-3)

    @parameterized.parameters((12, 2), (140, 1))
    def test_codes_are_those_of_plain_loops(self, inputs, cycles):
        """Also with more inputs than reach the others together."""
        x, _, w = random_layer(inputs=inputs, outputs=3, tokens=2 * inputs)
        h = x.T @ x
        _, codebook = k_means(w, np.diagonal(h), 8)
        codes = np.random.default_rng(1).integers(0, 8, size=w.shape).astype(np.int32)
        got = codes_step(w, h, codes, codebook, cycles)
        expected = codes64(w, h, codes, np.asarray(codebook), cycles)
        assert np.mean(got == expected) > 0.99  # float32 and two levels that are as near
        assert np.mean(got == codes) < 0.7

    def test_k_means_is_where_lloyds_algorithm_ends(self):
        _, _, w = random_layer(inputs=30)
        importance = np.random.default_rng(1).uniform(size=30).astype(np.float32)
        codes, levels = k_means(w, importance, 4)
        distance = np.abs(w[:, None] - np.asarray(levels))
        np.testing.assert_array_equal(codes, distance.argmin(axis=1))
        for j in range(w.shape[1]):
            for value in range(4):
                own = codes[:, j] == value
                mean = np.average(w[own, j], weights=importance[own])
                np.testing.assert_allclose(levels[value, j], mean, rtol=1e-4, atol=1e-5)

    def test_guided_gptq_is_gptq_of_each_group(self):
        x, g, w = random_layer()
        h = guided_hessian(x, g, num_groups=2)
        spec = QuantSpec(bits=4, granularity="block", axis=0, block_size=5, symmetric=False)
        q = guided_gptq(w, h, spec)
        for part, each in ((slice(0, 3), h[0]), (slice(3, 6), h[1])):
            alone = gptq_quantize(w[:, part], each, spec)
            np.testing.assert_array_equal(dequantize(q)[:, part], dequantize(alone))


class TestClaims:
    @pytest.mark.claim("guidedquant-lnq")
    def test_guidance_predicts_and_lowers_the_end_loss(self):
        """Of 40 kernels that are rounded at random, and of the one that LNQ chooses."""
        x, w, g, loss = network()
        guided, plain = guided_hessian(x, g, num_groups=16), guided_hessian(x, jnp.ones_like(g))
        rng = np.random.default_rng(0)
        step = 0.05 * np.exp(0.5 * rng.normal(size=(40, 1, 16)))
        rounded = (np.floor(w / step + rng.uniform(size=(40, 12, 16))) * step).astype(np.float32)
        changes = jax.vmap(loss)(rounded) - loss(w)
        correlations = [
            scipy.stats.spearmanr(
                jax.vmap(lambda q, h=h: guided_objective(w, q, h))(rounded), changes
            ).statistic
            for h in (guided, plain)
        ]
        assert correlations[0] > 0.8 > correlations[1] + 0.4, correlations
        kernels = [lnq_dequantize(lnq_quantize(w, h, bits=2)) for h in (guided, plain)]
        losses = [loss(q) - loss(w) for q in kernels]
        assert 0 < losses[0] < 0.5 * losses[1], losses

    def test_no_half_step_raises_the_objective(self):
        x, g, w = random_layer(outputs=8)
        h = np.asarray(guided_hessian(x, g)[0])
        codes, codebook = k_means(w, np.diagonal(h), 4)
        values = [objectives(w, np.take_along_axis(codebook, codes, axis=0), h)]
        for _ in range(3):
            codebook = codebook_step(w, h, codes, codebook, 1e-7)
            values.append(objectives(w, np.take_along_axis(codebook, codes, axis=0), h))
            codes = codes_step(w, h, codes, codebook, 2)
            values.append(objectives(w, np.take_along_axis(codebook, codes, axis=0), h))
        assert np.all(np.diff(values, axis=0) <= 1e-5 * values[0])
        assert np.all(values[-1] < 0.5 * values[0])
        # The same by one call, but for the last codes.
        q = lnq_quantize(w, h, bits=2, coordinate_cycles=2)
        np.testing.assert_allclose(objectives(w, lnq_dequantize(q), h), values[-2], rtol=1e-2)

    def test_from_the_codes_of_gptq_to_fewer_errors(self):
        x, g, w = random_layer(outputs=8)
        h = guided_hessian(x, g)
        q = gptq_quantize(w, h[0], QuantSpec(bits=3, granularity="channel", axis=1))
        levels = q.scale * jnp.arange(-4, 4)[:, None]
        init = (q.codes.astype(jnp.int32) + 4, levels)
        before = objectives(w, dequantize(q), h[0])
        after = objectives(w, lnq_dequantize(lnq_quantize(w, h, bits=3, init=init)), h[0])
        assert np.all(after <= before * (1 + 1e-5))
        assert after.sum() < 0.7 * before.sum()


def test_tensor_is_a_pytree_that_is_packed():
    x, g, w = random_layer()
    h = guided_hessian(x, g, num_groups=3)
    q = jax.jit(lambda w, h: lnq_quantize(w, h, bits=3))(w.astype(jnp.bfloat16), h)
    assert isinstance(q, LNQTensor)
    assert q.shape == w.shape
    assert q.values.shape == (12, 3)
    assert q.nbytes == 12 * 3 + 4 * 8 * 6
    assert 0 <= q.codes.min() <= q.codes.max() <= 7
    values = lnq_dequantize(q)
    assert values.dtype == jnp.bfloat16
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q)
    np.testing.assert_array_equal(jax.vmap(lnq_dequantize)(stacked)[1], values)
    gradient = jax.grad(
        lambda codebook: lnq_dequantize(
            LNQTensor(q.values, codebook, q.bits, jnp.dtype(jnp.float32), q.padding)
        ).sum()
    )(q.codebook)
    np.testing.assert_array_equal(gradient.sum(axis=0), 12)


def test_degenerate_input():
    x, g, w = random_layer()
    x[:, 2] = 0
    w[:, 0], w[:, 1] = 0, 1
    quantized = [
        lnq_dequantize(lnq_quantize(w, h, bits=2))
        for h in (guided_hessian(x, g), 0 * guided_hessian(x, g), guided_hessian(x[:3], g[:3]))
    ]
    for q in quantized:
        assert np.isfinite(q).all()
        np.testing.assert_allclose(q[:, 0], 0, atol=1e-6)
        np.testing.assert_allclose(q[:, 1], 1, rtol=1e-5)
    np.testing.assert_array_equal(guided_hessian(x[:0], g[:0]), np.zeros((1, 12, 12)))


def test_bad_input_is_named():
    x, g, w = random_layer()
    h = guided_hessian(x, g, num_groups=2)
    with pytest.raises(ValueError, match=r"output_gradients must have shape \(50, 6\)"):
        guided_hessian(x, g[1:])
    with pytest.raises(ValueError, match="num_groups must divide the 6 outputs, got 4"):
        guided_hessian(x, g, num_groups=4)
    with pytest.raises(ValueError, match="num_groups must be in"):
        guided_hessian(x, g, num_groups=0)
    with pytest.raises(TypeError, match="inputs must have a floating-point type"):
        guided_hessian(x.astype(int), g)
    with pytest.raises(ValueError, match=r"inputs must have shape \[..., in\], got \(\)"):
        guided_hessian(jnp.float32(1), g)
    with pytest.raises(ValueError, match=r"weight_hat must have shape \(12, 6\)"):
        guided_objective(w, w[1:], h)
    for function in (
        lambda w, h: guided_objective(w, w, h),
        lambda w, h: lnq_quantize(w, h, bits=3),
        lambda w, h: guided_gptq(w, h, QuantSpec(granularity="channel", axis=1)),
    ):
        with pytest.raises(ValueError, match=r"hessians must have shape \(2, 12, 12\)"):
            function(w, h[:, 1:])
        with pytest.raises(ValueError, match="hessians must be as many as divide the 6 outputs"):
            function(w, jnp.concatenate([h, h]))
        with pytest.raises(ValueError, match="weight must be finite"):
            function(w * np.inf, h)
        with pytest.raises(ValueError, match="hessians must be finite"):
            function(w, h * np.nan)
        with pytest.raises(ValueError, match=r"weight must have shape \[in, out\]"):
            function(w[0], h)
    with pytest.raises(ValueError, match=r"bits must be in \[2, 8\], got 9"):
        lnq_quantize(w, h, bits=9)
    with pytest.raises(ValueError, match="iterations must be in"):
        lnq_quantize(w, h, bits=3, iterations=-1)
    with pytest.raises(ValueError, match="coordinate_cycles must be in"):
        lnq_quantize(w, h, bits=3, coordinate_cycles=0)
    with pytest.raises(ValueError, match="ridge must be in"):
        lnq_quantize(w, h, bits=3, ridge=0)
    codes, levels = jnp.zeros((12, 6), jnp.int32), jnp.zeros((8, 6))
    with pytest.raises(TypeError, match="init must have integers for codes, got float32"):
        lnq_quantize(w, h, bits=3, init=(levels, levels))
    with pytest.raises(ValueError, match=r"init\[1\] must have shape \(8, 6\), got \(4, 6\)"):
        lnq_quantize(w, h, bits=3, init=(codes, levels[:4]))
    with pytest.raises(ValueError, match=r"init\[0\] must be in \[0, 7\]"):
        lnq_quantize(w, h, bits=3, init=(codes + 8, levels))
    with pytest.raises(TypeError, match="q must be an LNQTensor, got ndarray"):
        lnq_dequantize(w)
    with pytest.raises(TypeError, match="spec must be a QuantSpec, got int"):
        guided_gptq(w, h, 4)
    for spec in (QuantSpec(), QuantSpec(granularity="block", axis=1, block_size=2)):
        with pytest.raises(ValueError, match="spec must give every output scales of its own"):
            guided_gptq(w, h, spec)
