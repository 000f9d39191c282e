import math
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxref.attention import (
    dot_product_attention,
    grow_optimizer_state,
    grow_parameter_tokens,
    parameter_attention,
)
from jaxref.parallel import make_mesh

AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "pattention.npz")
NORMALIZATIONS = ("l2_gelu", "gelu_l2", "softmax")


def random_inputs(leading=(3,), inputs=4, outputs=2, tokens=6, seed=0):
    """x, keys and values."""
    rng = np.random.default_rng(seed)
    shapes = ((*leading, inputs), (tokens, inputs), (tokens, outputs))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("l2_gelu", "gelu_l2", "softmax", "l2_gelu_masked", "gelu_l2_masked")
    def test_values_and_gradients_match_the_authors(self, case):
        attend = partial(
            parameter_attention,
            normalization=case.removesuffix("_masked"),
            epsilon=0.0,
            where=AUTHORS["where"] if case.endswith("masked") else None,
        )
        names = ("x", "key_tokens", "value_tokens")
        y, vjp = jax.vjp(self.variant(attend), *(AUTHORS[name] for name in names))
        np.testing.assert_allclose(y, AUTHORS[case], rtol=1e-4, atol=1e-5)
        for name, gradient in zip(names, vjp(AUTHORS["cotangent"])):
            expected = AUTHORS[f"{case}_grad_{name}"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)

    def test_epsilon_scale_and_mask_by_hand(self):
        x, keys, values = (a.astype(np.float64) for a in random_inputs())
        scores = x @ keys.T
        gelu = np.vectorize(lambda a: a * (1 + math.erf(a / math.sqrt(2))) / 2)
        unit = lambda a: a / (np.linalg.norm(a, axis=-1, keepdims=True) + 0.5)
        expected = {"l2_gelu": gelu(3 * unit(scores)), "gelu_l2": 3 * unit(gelu(scores))}
        for normalization, weights in expected.items():
            ours = parameter_attention(
                *random_inputs(), normalization=normalization, scale=3.0, epsilon=0.5
            )
            np.testing.assert_allclose(ours, weights @ values, rtol=1e-4, atol=1e-5)
        where = np.arange(6) < 4
        softmax = partial(parameter_attention, normalization="softmax")
        x, keys, values = random_inputs()
        ours = softmax(x, keys, values, where=where)
        np.testing.assert_allclose(ours, softmax(x, keys[:4], values[:4], scale=6.0), rtol=1e-5)

    def test_gradients_against_finite_differences(self):
        with jax.enable_x64(True):
            arrays = [a.astype(np.float64) for a in random_inputs()]
            check_grads(jax.jit(parameter_attention), arrays, order=1, modes=["rev"])


class TestClaims:
    @pytest.mark.claim("tokenformer")
    def test_a_grown_model_computes_the_same_and_learns_faster_than_one_from_scratch(self):
        """Zero keys change nothing while the scale is held; they learn nevertheless, so that
        training goes on from the loss that the smaller model had reached."""
        x, keys, values = random_inputs((64,), 8, 4, 16, seed=1)
        targets = np.tanh(x @ np.random.default_rng(2).normal(size=(8, 4))).astype("f")
        optimizer = optax.adam(3e-3)
        scale = 4.0  # the root of 16 tokens

        @partial(jax.jit, static_argnums=2)
        def train(parameters, state, steps):
            def loss(parameters):
                return jnp.mean((parameter_attention(x, *parameters, scale=scale) - targets) ** 2)

            def step(carry, _):
                parameters, state = carry
                value, gradients = jax.value_and_grad(loss)(parameters)
                updates, state = optimizer.update(gradients, state)
                return (optax.apply_updates(parameters, updates), state), (value, gradients[0])

            return jax.lax.scan(step, (parameters, state), length=steps)

        small = (0.02 * keys, 0.1 * values)
        (small, state), (losses, _) = train(small, optimizer.init(small), 300)
        grown = grow_parameter_tokens(*small, 16, key=jax.random.key(0))
        before = parameter_attention(x, *small)
        after = parameter_attention(x, *grown, scale=scale)
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
        rescaled = parameter_attention(x, *grown)
        assert np.abs(rescaled - before).max() > 0.1

        state = grow_optimizer_state(state, jax.eval_shape(optimizer.init, grown))
        (learned, _), (continued, key_gradients) = train(grown, state, 100)
        np.testing.assert_allclose(continued[0], losses[-1], rtol=0.05)
        assert np.all(np.any(key_gradients[0, 16:] != 0, axis=1))
        assert np.all(np.any(learned[0][16:] != 0, axis=1))
        _, keys, values = random_inputs((1,), 8, 4, 32, seed=3)
        fresh = (0.02 * keys, 0.1 * values)
        _, (scratch, _) = train(fresh, optimizer.init(fresh), 100)
        assert continued[-1] < continued[0]
        assert continued[-1] < 0.5 * scratch[-1]

    def test_softmax_form_is_single_head_attention_times_the_number_of_tokens(self):
        x, keys, values = random_inputs()
        ours = parameter_attention(x, keys, values, normalization="softmax")
        attended = dot_product_attention(
            x[None, :, None], keys[None, :, None], values[None, :, None], scale=1.0
        )
        np.testing.assert_allclose(ours, 6 * attended[0, :, 0], rtol=1e-5, atol=1e-6)

    def test_only_the_l2_gelu_form_ignores_the_size_of_its_input(self):
        x, keys, values = random_inputs()
        for normalization in NORMALIZATIONS:
            attend = partial(parameter_attention, normalization=normalization, epsilon=0.0)
            same = np.allclose(attend(8 * x, keys, values), attend(x, keys, values), rtol=1e-5)
            assert same == (normalization == "l2_gelu")


class TestGrowth:
    def test_new_tokens_come_last_in_any_shape_and_type(self):
        keys, values = jnp.ones((3, 2, 4), jnp.bfloat16), jnp.ones((3, 500))
        more = grow_parameter_tokens(keys, values, 2, key=jax.random.key(0), value_std=0.5)
        assert [(a.shape, a.dtype) for a in more] == [
            ((5, 2, 4), jnp.bfloat16),
            ((5, 500), jnp.float32),
        ]
        assert np.all(more[0][3:] == 0)
        assert np.all(more[0][:3] == 1)
        assert np.all(more[1][:3] == 1)
        np.testing.assert_allclose(np.std(more[1][3:]), 0.5, rtol=0.1)
        none = grow_parameter_tokens(keys, values, 0, key=jax.random.key(0))
        chex.assert_trees_all_equal(none, (keys, values))

    def test_optimizer_state_keeps_what_it_knows(self):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
        small = {"keys": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        _, state = optimizer.update(small, optimizer.init(small), small)
        large = {"keys": jnp.ones((5, 3)), "bias": jnp.ones(3)}
        grown = grow_optimizer_state(state, jax.eval_shape(optimizer.init, large))
        adam, before = grown[1][0], state[1][0]
        assert adam.count == 1
        np.testing.assert_array_equal(adam.mu["keys"][:2], before.mu["keys"])
        np.testing.assert_array_equal(adam.nu["keys"][2:], 0)
        np.testing.assert_array_equal(adam.nu["bias"], before.nu["bias"])
        chex.assert_trees_all_equal_shapes_and_dtypes(grown, optimizer.init(large))
        optimizer.update(large, grown, large)


class TestTransformations:
    def test_leading_axes_vmap_and_shardings(self):
        x, keys, values = random_inputs((8, 5), tokens=16)
        expected = parameter_attention(x, keys, values)
        flat = parameter_attention(x.reshape(40, 4), keys, values)
        np.testing.assert_allclose(expected.reshape(40, 2), flat, rtol=1e-5, atol=1e-6)
        mapped = jax.jit(jax.vmap(parameter_attention, (0, None, None)))(x, keys, values)
        np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)
        mesh = make_mesh({"data": 2, "tensor": 4})
        place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        ours = jax.jit(parameter_attention)(
            place(x, "data"), place(keys, "tensor"), place(values, "tensor")
        )
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


class TestEdges:
    @pytest.mark.parametrize("epsilon", [0.0, 1e-5])
    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_zero_huge_and_masked_rows_have_finite_gradients(self, normalization, epsilon):
        x, keys, values = random_inputs((5,))
        x[0], x[1], x[2] = 0, 1e4 * x[1], 1e-25 * x[2]
        where = np.ones((5, 6), bool)
        where[3] = False
        attend = partial(
            parameter_attention, normalization=normalization, epsilon=epsilon, where=where
        )
        y, vjp = jax.vjp(jax.jit(attend), x, keys, values)
        gradients = vjp(np.ones_like(y))
        chex.assert_tree_all_finite((y, gradients))
        assert np.all(y[3] == 0)
        assert np.all(gradients[0][3] == 0)
        if normalization != "softmax":
            assert np.all(y[0] == 0)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        x, keys, values = (jnp.asarray(a, dtype) for a in random_inputs())
        attend = jax.jit(parameter_attention)
        ours = attend(30 * x, keys, values)  # the squares of the scores overflow float16
        assert ours.dtype == dtype
        exact = attend(*(a.astype("f") for a in (30 * x, keys, values)))
        tolerance = 8 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(ours.astype("f"), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"normalization": "l1"}, ValueError, "normalization must be 'l2_gelu'"),
        ({"epsilon": -1.0}, ValueError, "epsilon must be in"),
        ({"scale": 0.0}, ValueError, "scale must be in"),
        ({"scale": np.ones(6, "f")}, ValueError, r"scale must have shape \(\)"),
        ({"x": np.float32(1)}, ValueError, "got a scalar"),
        ({"x": np.ones((3, 5), "f")}, ValueError, r"key_tokens must have shape \(6, 5\)"),
        ({"x": np.ones((3, 4), int)}, TypeError, "x must have a floating-point type"),
        (
            {"value_tokens": np.ones((7, 2), "f")},
            ValueError,
            r"value_tokens must have shape \(6, 2",
        ),
        ({"key_tokens": np.ones((0, 4), "f")}, ValueError, "with n at least 1"),
        ({"value_tokens": np.ones(6, "f")}, ValueError, r"value_tokens must have shape \[n"),
        ({"where": np.ones((2, 6), bool)}, ValueError, "where must broadcast to"),
    ],
)
def test_bad_input_is_named(change, error, message):
    names = ("x", "key_tokens", "value_tokens")
    with pytest.raises(error, match=message):
        parameter_attention(**(dict(zip(names, random_inputs())) | change))


def test_bad_growth_is_named():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"shapes \[n, ...\], got \(3, 2\) and \(4, 2\)"):
        grow_parameter_tokens(np.ones((3, 2), "f"), np.ones((4, 2), "f"), 1, key=key)
    with pytest.raises(ValueError, match="extra must be in"):
        grow_parameter_tokens(np.ones((3, 2), "f"), np.ones((3, 2), "f"), -1, key=key)
    with pytest.raises(ValueError, match="grown must have the tree structure"):
        grow_optimizer_state({"a": np.ones(3)}, {"b": np.ones(4)})
    with pytest.raises(ValueError, match=r"grown\['a'\] must be no smaller than \(3,\)"):
        grow_optimizer_state({"a": np.ones(3)}, {"a": np.ones(2)})
