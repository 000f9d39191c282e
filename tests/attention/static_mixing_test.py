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
from jax.test_util import check_grads

from jaxref.attention import (
    causal_pair_reduction,
    causal_pair_reduction_init,
    causal_pair_reduction_step,
)

AUTHOR = np.load(Path(__file__).parents[1] / "oracles" / "causal_reduction.npz")
REDUCTIONS = {"min": np.min, "max": np.max, "mean": np.mean}


def random_tokens(shape=(2, 6, 3), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def literal(x, reduction, context, where=None):
    """The definition token by token, in float64."""
    x = np.asarray(x, np.float64)
    where = np.ones(len(x), bool) if where is None else where
    y = np.zeros_like(x)
    for t in np.flatnonzero(where):
        candidates = [x[t], x[t - 1] if t > 0 and where[t - 1] else x[t]]
        if context == "causal":
            candidates.append(x[: t + 1][where[: t + 1]].mean(0))
        if context == "global":
            candidates.append(x[where].mean(0) if where[:t].any() else x[t])
        y[t] = REDUCTIONS[reduction](candidates, axis=0)
    return y


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(("min", None), ("max", None), ("max", "global"))
    def test_values_and_gradients_match_the_author(self, reduction, context):
        mix = self.variant(partial(causal_pair_reduction, reduction=reduction, context=context))
        y, vjp = jax.vjp(mix, AUTHOR["x"])
        case = f"{reduction}_{context}"
        np.testing.assert_allclose(y, AUTHOR[case], rtol=1e-6, atol=1e-7)
        (gradient,) = vjp(AUTHOR["cotangent"])
        np.testing.assert_allclose(gradient, AUTHOR[f"{case}_grad"], rtol=1e-5, atol=1e-6)

    @parameterized.product(reduction=("min", "max", "mean"), context=(None, "causal", "global"))
    def test_values_match_the_definition_with_and_without_a_mask(self, reduction, context):
        x = random_tokens((3, 7, 2))
        where = np.ones((3, 7), bool)
        where[1, [0, 1, 4]], where[2] = False, False
        mix = jax.jit(partial(causal_pair_reduction, reduction=reduction, context=context))
        poisoned = np.where(where[..., None], x, np.nan).astype("f")
        ours = mix(poisoned, where=where[..., None])
        for row, (tokens, exists) in enumerate(zip(x, where)):
            expected = literal(tokens, reduction, context, exists)
            np.testing.assert_allclose(ours[row], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mix(x)[0], literal(x[0], reduction, context), atol=1e-6)

    def test_gradients_against_finite_differences(self):
        with jax.enable_x64(True):
            x = random_tokens((5, 2)).astype(np.float64)
            for context in ("causal", "global"):
                mix = partial(causal_pair_reduction, reduction="mean", context=context)
                check_grads(jax.jit(mix), (x,), order=1, modes=["rev"])


class TestClaims:
    @pytest.mark.claim("causal-generation-function")
    def test_each_token_reads_its_predecessor_and_with_a_causal_context_all_before_it(self):
        """The Jacobian says who is read; one token at a time gives the same as all at once."""
        x = random_tokens((6, 1))

        def reads(reduction, context):
            mix = partial(causal_pair_reduction, reduction=reduction, context=context)
            return np.asarray(jax.jit(jax.jacrev(mix))(x))[:, 0, :, 0] != 0

        causal = np.tri(6, dtype=bool)
        pairs = causal & ~np.tri(6, k=-2, dtype=bool)
        np.testing.assert_array_equal(reads("mean", None), pairs)
        np.testing.assert_array_equal(reads("mean", "causal"), causal)
        assert np.all(reads("mean", "global")[1:])
        for reduction in ("min", "max"):  # one candidate is read for each channel
            chosen = reads(reduction, None)
            assert not np.any(chosen & ~pairs)
            np.testing.assert_array_equal(chosen.sum(1), 1)
            assert not np.any(reads(reduction, "causal") & ~causal)

        batch = random_tokens((2, 6, 3))
        for reduction, context in (("min", None), ("max", "causal"), ("mean", "causal")):
            options = {"reduction": reduction, "context": context}
            step = jax.jit(partial(causal_pair_reduction_step, **options))
            state, outputs = causal_pair_reduction_init(2, 3), []
            for t in range(6):
                y, state = step(batch[:, t], state)
                outputs.append(y)
            at_once = causal_pair_reduction(batch, **options)
            tolerance = 0 if context is None else 1e-6
            np.testing.assert_allclose(
                np.stack(outputs, 1), at_once, rtol=tolerance, atol=tolerance
            )

    def test_a_stack_of_layers_sees_as_many_tokens_back(self):
        def stack(x):
            for _ in range(3):
                x = causal_pair_reduction(x, reduction="mean")
            return x

        reads = jax.jacrev(stack)(random_tokens((7, 1)))[:, 0, :, 0] != 0
        np.testing.assert_array_equal(reads, np.tri(7, dtype=bool) & ~np.tri(7, k=-4, dtype=bool))

    @pytest.mark.parametrize("context", [None, "causal", "global"])
    def test_minimum_mirrors_maximum_and_constants_stay(self, context):
        x = random_tokens()
        least = causal_pair_reduction(x, reduction="min", context=context)
        most = causal_pair_reduction(-x, reduction="max", context=context)
        np.testing.assert_array_equal(least, -most)
        constant = np.full((5, 2), 0.75, np.float32)
        for reduction in REDUCTIONS:
            y = causal_pair_reduction(constant, reduction=reduction, context=context)
            np.testing.assert_allclose(y, constant, rtol=1e-6)


class TestTransformations:
    def test_vmap_axis_and_sharded_batch(self):
        x = random_tokens((8, 6, 3))
        mix = partial(causal_pair_reduction, reduction="max", context="causal")
        expected = mix(x)
        np.testing.assert_allclose(jax.vmap(mix)(x), expected, rtol=1e-6)
        moved = mix(x.transpose(1, 0, 2), axis=0)
        np.testing.assert_allclose(moved.transpose(1, 0, 2), expected, rtol=1e-6)
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        ours = jax.jit(mix)(jax.device_put(x, sharding))
        assert ours.sharding.is_equivalent_to(sharding, 3)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)

    def test_sequences_of_a_batch_start_anew_on_their_own(self):
        x = random_tokens((2, 4, 3))
        step = jax.jit(partial(causal_pair_reduction_step, reduction="max", context="causal"))
        state = causal_pair_reduction_init(2, 3)
        for t in range(2):
            _, state = step(x[:, t], state)
        fresh = np.array([False, True])
        state = state._replace(
            total=jnp.where(fresh[:, None], 0, state.total), count=jnp.where(fresh, 0, state.count)
        )
        for t in range(2, 4):
            y, state = step(x[:, t], state)
        options = {"reduction": "max", "context": "causal"}
        np.testing.assert_allclose(y[0], causal_pair_reduction(x[0], **options)[-1], rtol=1e-6)
        np.testing.assert_allclose(y[1], causal_pair_reduction(x[1, 2:], **options)[-1], rtol=1e-6)
        np.testing.assert_array_equal(state.count, [4, 2])


class TestEdges:
    @pytest.mark.parametrize(
        ("reduction", "context"), [("min", None), ("mean", "causal"), ("max", "global")]
    )
    def test_single_and_no_token_huge_and_all_masked(self, reduction, context):
        mix = jax.jit(partial(causal_pair_reduction, reduction=reduction, context=context))
        one = random_tokens((2, 1, 3))
        np.testing.assert_allclose(mix(one), one, rtol=1e-6)
        assert mix(np.ones((2, 0, 3), "f")).shape == (2, 0, 3)
        masked = partial(mix, where=np.zeros((1, 4, 1), bool))
        y, vjp = jax.vjp(masked, np.full((2, 4, 3), 1e4, "f"))
        assert np.all(y == 0)
        assert np.all(vjp(np.ones_like(y))[0] == 0)
        same = jax.vjp(mix, np.full((4, 1), -1e4, "f"))[1](np.ones((4, 1), "f"))[0]
        np.testing.assert_allclose(same.sum(), 4, rtol=1e-6)  # ties share the gradient

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_sums_in_float32(self, dtype):
        x = jnp.asarray(1 + 0.25 * random_tokens((3000, 1)), dtype)
        ours = causal_pair_reduction(x, reduction="mean", context="causal")
        assert ours.dtype == dtype
        wide = causal_pair_reduction(x.astype("f"), reduction="mean", context="causal")
        np.testing.assert_array_equal(ours, wide.astype(dtype))
        y, state = causal_pair_reduction_step(x[:1], causal_pair_reduction_init(1, 1))
        assert y.dtype == dtype
        assert state.total.dtype == jnp.float32


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda x: causal_pair_reduction(x, reduction="sum"), ValueError, "reduction must be"),
        (lambda x: causal_pair_reduction(x, context="local"), ValueError, "context must be None"),
        (lambda x: causal_pair_reduction(x, axis=3), ValueError, "axis must name axes"),
        (lambda x: causal_pair_reduction(x[0, 0]), ValueError, "axis must name axes"),
        (lambda x: causal_pair_reduction(x.astype(int)), TypeError, "x must have a floating"),
        (
            lambda x: causal_pair_reduction(x, where=np.ones((2, 6), bool)),
            ValueError,
            "where must broadcast to",
        ),
        (
            lambda x: causal_pair_reduction_step(
                x[:, 0], causal_pair_reduction_init(2, 3), context="global"
            ),
            ValueError,
            "context must be None or 'causal' in decoding",
        ),
        (
            lambda x: causal_pair_reduction_step(x, causal_pair_reduction_init(2, 3)),
            ValueError,
            r"x must have shape \(2, 3\)",
        ),
        (lambda x: causal_pair_reduction_init(2, 0), ValueError, "features must be in"),
    ],
)
def test_bad_input_is_named(function, error, message):
    with pytest.raises(error, match=message):
        function(random_tokens())
