from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref import norms
from jaxref.nn import GradientState, Norm
from jaxref.norms import layer_norm, rms_norm


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, size=shape).astype(np.float32)


def parameters(norm):
    return nnx.to_pure_dict(nnx.state(norm))


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (rms_norm, {"scale"}),
        (layer_norm, {"scale", "bias"}),
        (partial(rms_norm, epsilon=0.1), {"scale"}),
        (partial(partial(layer_norm, epsilon=0.1), axis=-1), {"scale", "bias"}),
        (jax.jit(layer_norm), {"scale", "bias"}),
        (partial(layer_norm, bias=None), {"scale"}),
        (partial(layer_norm, scale=None), {"bias"}),
        (partial(layer_norm, scale=None, bias=None), set()),
        (lambda x: x, set()),
    ],
)
def test_parameters_are_those_of_the_signature(function, names):
    norm = Norm(function, 6)
    assert parameters(norm).keys() == names
    for name, value in parameters(norm).items():
        np.testing.assert_array_equal(value, np.full(6, {"scale": 1.0, "bias": 0.0}[name]))
    x = random((3, 6))
    np.testing.assert_allclose(norm(x), function(x), atol=1e-6)


def test_matches_flax_and_so_do_the_gradients():
    x, scale, bias = random((4, 3, 6)), random(6, 1), random(6, 2)
    for function, theirs in (
        (layer_norm, nnx.LayerNorm(6, epsilon=1e-6, rngs=nnx.Rngs(0))),
        (rms_norm, nnx.RMSNorm(6, epsilon=1e-6, rngs=nnx.Rngs(0))),
    ):
        ours = Norm(function, 6)
        for norm in (ours, theirs):
            norm.scale[...] = scale
            if function is layer_norm:
                norm.bias[...] = bias
        loss = lambda norm, x: jnp.sum(norm(x) * random(x.shape, 3))
        value, grads = nnx.value_and_grad(loss, argnums=(0, 1))(ours, x)
        expected, expected_grads = nnx.value_and_grad(loss, argnums=(0, 1))(theirs, x)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            (nnx.to_pure_dict(grads[0]), grads[1]),
            (nnx.to_pure_dict(expected_grads[0]), expected_grads[1]),
        )


def test_a_fixed_bias_is_applied():
    norm = Norm(partial(layer_norm, bias=jnp.arange(6.0)), 6)
    assert norm.bias is None
    x = random((2, 6))
    np.testing.assert_allclose(norm(x), layer_norm(x) + jnp.arange(6.0), atol=1e-6)


def test_types_and_names():
    norm = Norm(layer_norm, 6, axes=("embed",), param_dtype=jnp.bfloat16)
    for parameter in (norm.scale, norm.bias):
        assert parameter.dtype == jnp.bfloat16
        assert parameter.get_metadata()["axes"] == ("embed",)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert norm(jnp.ones((2, 6), dtype)).dtype == dtype
    assert Norm(rms_norm, 6).scale.get_metadata()["axes"] == (None,)


def test_input_of_another_size_raises():
    with pytest.raises(ValueError, match=r"scale must have shape \(5,\), got \(6,\)"):
        Norm(rms_norm, 6)(jnp.ones((2, 5)))


@pytest.mark.parametrize("name", ["power_norm", "unified_norm", "evonorm_b0", "evonorm_b2"])
class TestStatistics:
    """Norms with running statistics, some of which the backward pass advances."""

    def step(self, norm, x):
        """A step of training, its gradients and the statistics before and after it."""
        graph, params, backward, rest = nnx.split(norm, nnx.Param, GradientState, ...)

        @jax.jit
        def slopes(params, backward, rest, x):
            def loss(params, backward):
                norm = nnx.merge(graph, params, backward, rest, copy=True)
                y = norm(x)
                return jnp.sum(y * random(x.shape, 3)), nnx.state(norm, nnx.BatchStat)

            return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, backward)

        (of_params, following), statistics = slopes(params, backward, rest, x)
        nnx.update(norm, following, statistics)
        return of_params

    def test_a_step_of_training_is_that_of_the_function(self, name):
        x, norm = random((8, 3, 6)), Norm(getattr(norms, name), 6)
        function, before = getattr(norms, name), getattr(norms, f"{name}_init")(6)
        backward = getattr(before, "backward_fields", ())
        assert {f for f, v in norm.state.items() if isinstance(v, GradientState)} == set(backward)
        of_params = self.step(norm, x)
        learned = {"scale": jnp.ones(6), "bias": jnp.zeros(6)}
        if name == "evonorm_b0":
            learned["v"] = jnp.ones(6)

        def loss(learned, state):
            y, following = function(x, state, **learned, training=True)
            return jnp.sum(y * random(x.shape, 3)), following

        slope = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True))
        (expected, gradient), after = slope(learned, before)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            nnx.to_pure_dict(of_params),
            expected,
        )
        for field, variable in norm.state.items():
            next_value = getattr(gradient if field in backward else after, field)
            np.testing.assert_allclose(variable[...], next_value, rtol=1e-5, atol=1e-6)
            assert field == "skipped" or np.any(next_value != getattr(before, field))

    def test_evaluation_uses_the_statistics_and_keeps_them(self, name):
        x, norm = random((8, 3, 6)), Norm(getattr(norms, name), 6)
        self.step(norm, x)
        norm.eval()
        before = {field: np.asarray(variable[...]) for field, variable in norm.state.items()}
        state = norm._state_type(**before)
        expected, _ = getattr(norms, name)(x[:1], state, training=False)
        np.testing.assert_allclose(norm(x[:1]), expected, rtol=1e-5, atol=1e-6)
        for field, variable in norm.state.items():
            np.testing.assert_array_equal(variable[...], before[field])


def test_evonorms_of_the_sample_series_have_no_statistics():
    for name, names in (("evonorm_s0", {"scale", "bias", "v"}), ("evonorm_s2", {"scale", "bias"})):
        norm = Norm(partial(getattr(norms, name), groups=2), 6)
        assert norm.state is None
        assert parameters(norm).keys() == names
        assert norm(random((2, 3, 6))).shape == (2, 3, 6)


def test_a_mask_reaches_the_statistics():
    x = random((8, 3, 6))
    where = np.arange(8).reshape(8, 1, 1) < 5
    masked, alone = Norm(norms.power_norm, 6), Norm(norms.power_norm, 6)
    np.testing.assert_allclose(masked(x, where=where)[:5], alone(x[:5]), rtol=1e-5)
    np.testing.assert_allclose(
        masked.state["psi_squared"][...], alone.state["psi_squared"][...], rtol=1e-5
    )
