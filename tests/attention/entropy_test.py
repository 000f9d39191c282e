from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxref.attention import (
    attention_entropy,
    attention_entropy_lower_bound,
    attention_entropy_regularizer,
    attention_probabilities,
    dot_product_attention,
    entropy_guided_attention,
    entropy_profile,
    scaled_fused_ffn,
)

AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "entropy_regularization.npz")
# causal, tolerance, context size
CASES = {"full": (False, 0.2, None), "causal": (True, 0.05, 16)}


def random_inputs(batch=2, q_len=5, k_len=6, heads=4, kv_heads=2, dim=8, seed=0):
    """Query, key, value and log temperatures."""
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, q_len, heads, dim),
        (batch, k_len, kv_heads, dim),
        (batch, k_len, kv_heads, dim),
        (heads, q_len),
    )
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def random_probabilities(shape, seed=0):
    logits = np.random.default_rng(seed).normal(0, 2, size=shape)
    return np.asarray(jax.nn.softmax(logits.astype(np.float32), axis=-1))


def entropy64(probabilities):
    """The formula in float64."""
    p = np.asarray(probabilities, np.float64)
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("full", "causal")
    def test_entropy_and_regularizer_match_the_authors(self, case):
        causal, tolerance, context_size = CASES[case]

        def penalty(logits, weights):
            probabilities = jax.nn.softmax(
                logits, axis=-1, where=np.tri(5, dtype=bool) if causal else None
            )
            return attention_entropy_regularizer(
                probabilities,
                weights,
                tolerance=tolerance,
                coefficient=1e-2,
                context_size=context_size,
            ), attention_entropy(probabilities)

        (value, entropy), gradients = self.variant(
            jax.value_and_grad(penalty, argnums=(0, 1), has_aux=True)
        )(AUTHORS["logits"], AUTHORS["threshold_weights"])
        np.testing.assert_allclose(entropy, AUTHORS[f"{case}_entropy"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(value, AUTHORS[f"{case}_penalty"], rtol=1e-5)
        for name, gradient in zip(("logits", "threshold_weights"), gradients):
            expected = AUTHORS[f"{case}_grad_{name}"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_probabilities_are_the_weights_of_dot_product_attention(self):
        query, key, _, _ = random_inputs()
        mask = np.random.default_rng(1).random((2, 1, 5, 6)) < 0.7
        mask[0, 0, 2] = False
        bias = np.random.default_rng(2).normal(size=(4, 5, 6)).astype("f")
        bias[1, 4, :3] = -np.inf
        # a value for each key that is 1 there and 0 elsewhere reads the weights off
        value = np.broadcast_to(np.eye(6, dtype="f")[:, None], (2, 6, 2, 6))
        options = {"bias": bias, "mask": mask, "scale": 0.5, "is_causal": True}
        ours = self.variant(lambda *a: attention_probabilities(*a, **options))(query, key)
        expected = dot_product_attention(query, key, value, **options).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
        assert np.all(ours[0, :, 2] == 0)
        hidden = np.where(np.arange(5) == 3, -np.inf, 0).astype("f")[:, None]
        plain = attention_probabilities(query, key, bias=hidden)
        expected = dot_product_attention(query, key, value, bias=hidden).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-6)

    def test_gradients_of_probabilities_match_those_of_attention(self):
        query, key, value, _ = random_inputs()
        mask = np.random.default_rng(1).random((5, 6)) < 0.7
        mask[2] = False

        def weighted(query, key, value):
            probabilities = attention_probabilities(query, key, mask=mask)
            groups = probabilities.reshape(2, 2, 2, 5, 6)
            return jnp.einsum("bhgqk,bkhd->bqhgd", groups, value).reshape(2, 5, 4, 8)

        attend = lambda *a: dot_product_attention(*a, mask=mask)
        ours, theirs = (
            jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2)))(
                query, key, value
            )
            for f in (weighted, attend)
        )
        chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_guided_attention_matches_float64(self):
        query, key, value, log_temperature = random_inputs()
        bias = np.random.default_rng(1).normal(size=(5, 6)).astype("f")
        options = {"bias": bias, "scale": 0.4, "is_causal": True}
        attend = jax.jit(lambda *a: entropy_guided_attention(*a, **options))
        ours = attend(query, key, value, log_temperature)
        q, k, v = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (query, key, value))
        k, v = k.repeat(2, axis=1), v.repeat(2, axis=1)
        temperature = np.exp(log_temperature.astype(np.float64))[:, :, None]
        logits = 0.4 * q @ k.swapaxes(-1, -2) / temperature + bias
        logits = np.where(np.tri(5, 6, dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        expected = (weights / weights.sum(-1, keepdims=True)) @ v
        np.testing.assert_allclose(ours, expected.transpose(0, 2, 1, 3), rtol=1e-4, atol=1e-5)

    def test_gradients_against_finite_differences(self):
        with jax.enable_x64(True):
            arrays = [x.astype(np.float64) for x in random_inputs(1, 2, 3, 2, 1, 2)]
            check_grads(jax.jit(entropy_guided_attention), arrays, order=1, modes=["rev"])
            check_grads(
                jax.jit(lambda norm: attention_entropy_lower_bound(norm, np.arange(1, 4))),
                (np.array([0.3, 0.6, 2.0]),),
                order=1,
                modes=["rev"],
            )

    def test_fused_ffn_is_the_linear_mlp_with_its_residual(self):
        rng = np.random.default_rng(0)
        x, up, down = (rng.normal(size=size).astype("f") for size in ((2, 3, 4), (4, 16), (16, 4)))
        ours = scaled_fused_ffn(x, up @ down, 1.5, 0.7)
        np.testing.assert_allclose(ours, 0.7 * x + (x @ up) @ down / 1.5, rtol=1e-4, atol=1e-5)

    def test_profile_and_mean_against_loops(self):
        p = random_probabilities((2, 3, 4, 5, 6)) ** np.array([0.01, 1, 2, 9])[:, None, None]
        p = (p / p.sum(-1, keepdims=True)).astype("f")
        where = np.random.default_rng(1).random((2, 3, 1, 5)) < 0.6
        profile = entropy_profile(p, collapse=0.2, overload=0.9, where=where)
        admitted = np.broadcast_to(where, (2, 3, 4, 5))
        means, penalties = np.empty((2, 4)), np.empty((2, 4))
        weights = np.random.default_rng(2).random((2, 4)).astype("f")
        for layer, head in np.ndindex(2, 4):
            counted = entropy64(p[layer, :, head])[admitted[layer, :, head]]
            means[layer, head] = counted.mean()
            deviation = counted - weights[layer, head] * np.log(6)
            outside = np.abs(deviation) > 0.1 * np.log(6)
            penalties[layer, head] = np.mean(np.where(outside, deviation**2, 0))
        np.testing.assert_allclose(profile.per_head, means, rtol=1e-5)
        np.testing.assert_allclose(
            profile.collapse_fraction, (means < 0.2 * np.log(6)).mean(1), rtol=1e-6
        )
        np.testing.assert_allclose(
            profile.overload_fraction, (means > 0.9 * np.log(6)).mean(1), rtol=1e-6
        )
        assert np.all(profile.collapse_fraction > 0)
        assert np.all(profile.overload_fraction > 0)
        ours = attention_entropy_regularizer(
            p, weights, tolerance=0.1, coefficient=2.0, reduction="mean", where=where
        )
        np.testing.assert_allclose(ours, 2 * penalties.mean(), rtol=1e-5)


class TestClaims:
    @pytest.mark.claim("entropy-guided-attention")
    def test_temperatures_under_the_regularizer_end_the_overload_and_then_rest(self):
        """Heads that see all keys nearly alike: descent on the penalty alone sharpens each until
        its entropy is within the tolerance of its level, where nothing pushes it on."""
        query, key, value, _ = random_inputs(batch=4, q_len=8, k_len=8, heads=2, kv_heads=2)
        query *= 0.3
        levels = np.array([0.3, 0.6], np.float32)

        def weights_of(log_temperature):
            tempered = query * np.exp(-log_temperature.T)[:, :, None]
            return attention_probabilities(tempered, key)[None]

        def penalty(parameters):
            tempered = query * jnp.exp(-parameters["log_temperature"].T)[:, :, None]
            probabilities = attention_probabilities(tempered, key)[None]
            return attention_entropy_regularizer(
                probabilities, parameters["levels"], tolerance=0.3, coefficient=1.0
            )

        @jax.jit
        def descend(log_temperature):
            step = lambda t, _: (
                t
                - 0.1
                * jax.grad(penalty)({"log_temperature": t, "levels": levels})["log_temperature"],
                None,
            )
            log_temperature, _ = jax.lax.scan(step, log_temperature, length=400)
            parameters = {"log_temperature": log_temperature, "levels": levels}
            return log_temperature, jax.value_and_grad(penalty)(parameters)

        start = np.zeros((2, 8), np.float32)
        learned, (rest, gradients) = descend(start)
        assert np.all(entropy_profile(weights_of(start)).overload_fraction == 1)
        assert np.all(entropy_profile(weights_of(np.asarray(learned))).overload_fraction == 0)
        assert np.all(learned < 0)
        assert rest == 0
        assert all(np.all(gradient == 0) for gradient in gradients.values())
        before, after = (attention_entropy(weights_of(np.asarray(t)))[0] for t in (start, learned))
        bound = (levels[:, None] + 0.3) * np.log(8)
        assert np.all(before > bound)
        assert np.all(after <= bound)
        np.testing.assert_allclose(
            entropy_guided_attention(query, key, value, start),
            jax.nn.dot_product_attention(query, key, value),
            rtol=1e-5,
            atol=1e-6,
        )

    def test_entropy_grows_with_the_temperature_from_one_key_to_all(self):
        query, key, _, _ = random_inputs()
        temperatures = np.logspace(-4, 5, 12, dtype="f")
        entropies = np.stack(
            [attention_entropy(attention_probabilities(query / t, key)) for t in temperatures]
        )
        assert np.all(np.diff(entropies, axis=0) >= -1e-6)
        np.testing.assert_allclose(entropies[0], 0, atol=1e-5)
        np.testing.assert_allclose(entropies[-1], np.log(6), rtol=1e-6)

    def test_lower_bound_holds_and_is_reached(self):
        """The claim of sigma-reparam that concerns entropies; its marked test is with the norm."""
        norms = np.array([0.0, 0.1, 1.0, 3.0, 10.0], np.float32)
        counts = np.array([[2], [5], [20]])
        bound = attention_entropy_lower_bound(norms, counts)
        exists = np.arange(20) < counts[..., None]  # [counts, norms, keys]
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(300, 3, 5, 20)) * exists
        extremal = ((np.arange(20) == 0) - 1 / counts[..., None]) * exists
        logits = np.concatenate([logits, np.broadcast_to(extremal, (1, 3, 5, 20))])
        logits *= norms[:, None] / np.linalg.norm(logits, axis=-1, keepdims=True)
        entropies = np.asarray(attention_entropy(jax.nn.softmax(logits.astype("f"), where=exists)))
        least, reached = entropies[:-1].min(0), entropies[-1]
        np.testing.assert_allclose(reached, bound, rtol=1e-4, atol=1e-6)
        assert np.all(least >= bound - 1e-5)
        assert np.all(least[1:, 2:4] > bound[1:, 2:4] + 1e-3)


class TestTransformations:
    def test_vmap_axis_and_sharded_batch(self):
        query, key, value, log_temperature = random_inputs(batch=8)

        @jax.jit
        def both(query, key, value):
            probabilities = attention_probabilities(query, key, is_causal=True)
            penalty = attention_entropy_regularizer(probabilities[None], np.full(4, 0.5, "f"))
            guided = entropy_guided_attention(query, key, value, log_temperature, is_causal=True)
            return attention_entropy(probabilities), penalty, guided

        expected = both(query, key, value)
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        ours = both(*(jax.device_put(x, sharding) for x in (query, key, value)))
        assert ours[0].sharding.is_equivalent_to(sharding, 3)
        assert ours[2].sharding.is_equivalent_to(sharding, 4)
        chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)
        mapped = jax.jit(jax.vmap(both))(*(x[:, None] for x in (query, key, value)))
        np.testing.assert_allclose(mapped[0][:, 0], expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mapped[2][:, 0], expected[2], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mapped[1].sum(), expected[1], rtol=1e-5)

    def test_axis_of_the_keys(self):
        p = random_probabilities((3, 4, 5))
        ours = attention_entropy(p.transpose(2, 0, 1), axis=0)
        np.testing.assert_allclose(ours, attention_entropy(p), rtol=1e-6)


class TestEdges:
    def test_uniform_one_hot_and_no_keys(self):
        p = np.array([[0.25] * 4, [0, 1, 0, 0], [0] * 4], np.float32)
        gradient = jax.grad(lambda p: attention_entropy(p).sum())(p)
        np.testing.assert_allclose(attention_entropy(p), [np.log(4), 0, 0], rtol=1e-6)
        np.testing.assert_allclose(gradient[0], np.log(4) - 1, rtol=1e-6)
        np.testing.assert_array_equal(gradient[1:], [[0, -1, 0, 0], [0] * 4])
        where = np.array([[True] * 3 + [False], [False] * 4, [True] * 4])
        for poison in (0.5, np.nan):
            poisoned = np.where(where, p, poison).astype("f")
            masked, vjp = jax.vjp(lambda p: attention_entropy(p, where=where), poisoned)
            np.testing.assert_allclose(masked, [0.75 * np.log(4), 0, 0], rtol=1e-6)
            (gradient,) = vjp(np.ones(3, np.float32))
            assert np.all(np.isfinite(gradient))
            assert np.all(gradient[~where] == 0)

    def test_huge_logits_and_masked_queries_have_finite_gradients(self):
        query, key, value, log_temperature = random_inputs()
        query[0], key[1] = 1e4 * query[0], 0
        mask = np.ones((5, 6), bool)
        mask[3] = False

        def loss(query, key, value, log_temperature):
            p = attention_probabilities(query, key, mask=mask)
            guided = entropy_guided_attention(query, key, value, log_temperature, mask=mask)
            penalty = attention_entropy_regularizer(p[None], np.zeros(4, "f"), coefficient=1.0)
            return jnp.sum(attention_entropy(p)) + penalty + jnp.sum(guided**2)

        value_, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(
            query, key, value, log_temperature
        )
        chex.assert_tree_all_finite((value_, gradients))
        assert np.all(gradients[0][:, 3] == 0)
        assert np.all(gradients[3][:, 3] == 0)
        p = attention_probabilities(query, key, mask=mask)
        assert np.all(attention_entropy(p)[:, :, 3] == 0)
        guided = entropy_guided_attention(query, key, value, log_temperature, mask=mask)
        assert np.all(guided[:, 3] == 0)

    def test_one_key_no_counted_query_and_extreme_norms(self):
        one = np.ones((1, 1, 2, 3, 1), np.float32)
        assert attention_entropy_regularizer(one, np.ones(2, "f")) == 0
        nobody = np.zeros((1, 1, 1, 3), bool)
        p = random_probabilities((1, 1, 2, 3, 4))

        @jax.jit
        def both(weights):
            return [
                attention_entropy_regularizer(p, weights, where=nobody, reduction=reduction)
                for reduction in ("sum", "mean")
            ], entropy_profile(p, where=nobody).per_head

        assert all(np.all(x == 0) for x in jax.tree.leaves(both(np.zeros(2, "f"))))
        slope = jax.grad(lambda weights: sum(both(weights)[0]))(np.zeros(2, "f"))
        assert np.all(slope == 0)
        bound, gradient = jax.jit(jax.vmap(jax.value_and_grad(attention_entropy_lower_bound)))(
            np.array([0, 1e4, 0, 1e4], "f"), np.array([1, 1, 7, 7])
        )
        np.testing.assert_allclose(bound, [0, 0, np.log(7), 0], atol=1e-6)
        assert np.all(np.isfinite(gradient))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        arrays = [jnp.asarray(x, dtype) for x in random_inputs()]

        @jax.jit
        def all_of(query, key, value, log_temperature):
            p = attention_probabilities(query, key)
            fused = scaled_fused_ffn(query, jnp.eye(8, dtype=dtype), 1.0, jnp.float32(0.5))
            penalty = attention_entropy_regularizer(p[None], np.ones(4, "f"))
            guided = entropy_guided_attention(query, key, value, log_temperature)
            return guided, p, attention_entropy(p), fused, penalty

        guided, *others, penalty = all_of(*arrays)
        assert penalty.dtype == jnp.float32
        assert {array.dtype for array in (guided, *others)} == {jnp.dtype(dtype)}
        exact = all_of(*(x.astype(jnp.float32) for x in arrays))[0]
        tolerance = 16 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(guided.astype("f"), exact, rtol=tolerance, atol=tolerance)
        many = jnp.full((1, 30000), 1 / 30000, dtype)  # a sum in half precision would stall
        expected = entropy64(np.asarray(many, np.float64))
        np.testing.assert_allclose(np.float64(attention_entropy(many)), expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda p: attention_entropy(p, axis=5), ValueError, "axis must name axes"),
        (lambda p: attention_entropy(p, where=np.ones(3, bool)), ValueError, "where must broad"),
        (lambda p: attention_entropy(p.astype(int)), TypeError, "probabilities must have a float"),
        (lambda p: entropy_profile(p[0]), ValueError, r"probabilities must have shape \[layers"),
        (lambda p: entropy_profile(p, overload=2.0), ValueError, "overload must be in"),
        (lambda p: entropy_profile(p, context_size=0), ValueError, "context_size must be in"),
        (
            lambda p: attention_entropy_regularizer(p, np.ones(5, "f")),
            ValueError,
            "threshold_weights must broadcast to",
        ),
        (
            lambda p: attention_entropy_regularizer(p, np.ones(2, "f"), reduction="max"),
            ValueError,
            "reduction must be 'sum' or 'mean', got 'max'",
        ),
        (
            lambda p: attention_entropy_regularizer(p, np.ones(2, "f"), tolerance=-0.1),
            ValueError,
            "tolerance must be in",
        ),
        (
            lambda p: attention_entropy_regularizer(p, np.ones(2, "f"), where=np.ones(4, bool)),
            ValueError,
            "where must broadcast to",
        ),
        (lambda p: attention_entropy_lower_bound(-1.0, 2), ValueError, "logit_norm must be in"),
        (lambda p: attention_entropy_lower_bound(1.0, 0), ValueError, "num_keys must be in"),
        (lambda p: attention_entropy_lower_bound(1.0, 2.0), TypeError, "num_keys must be integers"),
        (
            lambda p: scaled_fused_ffn(p, np.ones((4, 5), "f"), 1.0, 1.0),
            ValueError,
            r"kernel must have shape \(4, 4\)",
        ),
        (
            lambda p: scaled_fused_ffn(p, np.eye(4, dtype="f"), np.ones(4, "f"), 1.0),
            ValueError,
            r"alpha must have shape \(\)",
        ),
        (
            lambda p: scaled_fused_ffn(np.float32(1), np.eye(1, dtype="f"), 1.0, 1.0),
            ValueError,
            "got a scalar",
        ),
        (
            lambda p: entropy_guided_attention(p[0], p[0], p[0], np.ones((2, 3), "f")),
            ValueError,
            r"log_temperature must have shape \(3, 2\)",
        ),
        (
            lambda p: attention_probabilities(p[0], p[0], mask=np.ones((2, 2))),
            TypeError,
            "mask must be boolean",
        ),
    ],
)
def test_bad_input_is_named(function, error, message):
    with pytest.raises(error, match=message):
        function(random_probabilities((1, 1, 2, 3, 4)))
