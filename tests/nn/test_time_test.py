from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref import norms
from jaxref.nn import AlphaBatchNorm, Norm, UnMixNorm
from jaxref.optimizers import norm_parameters_only


def trained(function=norms.batch_norm):
    """A norm of three features with parameters and statistics of its own."""
    norm = Norm(function, 3)
    rng = np.random.default_rng(0)
    for parameter in (norm.scale, norm.bias):
        if parameter is not None:
            parameter[...] = rng.normal(size=3)
    norm.state["mean"][...], norm.state["var"][...] = rng.normal(size=3), rng.uniform(1, 2, size=3)
    return norm


def inputs(shape=(4, 2, 2, 3)):
    return np.random.default_rng(1).normal(2, 1, size=shape).astype("f")


def moments(norm):
    return norm.state["mean"][...], norm.state["var"][...]


class TestAlphaBatchNorm:
    @pytest.mark.parametrize(
        "function",
        [
            norms.batch_norm,
            partial(norms.batch_norm, epsilon=0.1),
            partial(partial(norms.ghost_batch_norm, bias=None), epsilon=0.1, ghost_batch_size=2),
            partial(norms.estimated_batch_norm, rate=0.1, bias=np.ones(3, "f")),
        ],
    )
    def test_has_the_parameters_statistics_and_epsilon_of_the_norm(self, function):
        norm, x = trained(function), inputs()
        norm.eval()
        np.testing.assert_allclose(AlphaBatchNorm(norm, alpha=1.0)(x), norm(x), rtol=1e-4)
        fixed = getattr(function, "keywords", {})
        expected = norms.alpha_batch_norm(
            x,
            *moments(norm),
            norm.scale[...],
            fixed.get("bias") if norm.bias is None else norm.bias[...],
            alpha=0.6,
            epsilon=fixed.get("epsilon", 1e-5),
            mixture_moments=True,
        )
        ours = AlphaBatchNorm(norm, alpha=0.6, mixture_moments=True)(x)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    def test_takes_its_place_in_a_model_under_the_same_paths(self):
        model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), trained(), trained())
        swap = lambda path, node: AlphaBatchNorm(node) if isinstance(node, Norm) else node
        adapted = nnx.recursive_map(swap, model)
        assert isinstance(adapted.layers[1], AlphaBatchNorm)
        assert isinstance(model.layers[1], Norm)
        before, after = (nnx.to_pure_dict(nnx.state(m)) for m in (model, adapted))
        jax.tree.map(np.testing.assert_array_equal, before, after)
        assert nnx.jit(lambda model, x: model(x))(adapted, inputs()).shape == (4, 2, 2, 3)
        norm = {"norm": nnx.to_pure_dict(nnx.state(adapted.layers[1], nnx.Param))}
        assert norm_parameters_only(norm) == {"norm": {"bias": True, "scale": True}}


class TestUnMixNorm:
    def test_advances_its_components_in_evaluation_too(self):
        source, x = trained(partial(norms.batch_norm, epsilon=0.1)), inputs()
        norm = UnMixNorm(
            source, num_components=4, momentum=0.3, cross_variance=True, rngs=nnx.Rngs(0)
        )
        norm.eval()
        state = norms.UnMixState(norm.state["means"][...], norm.state["variances"][...])
        assert state.means.shape == state.variances.shape == (4, 3)
        np.testing.assert_allclose(state.variances[0], source.state["var"][...] / 2, rtol=1e-6)
        for _ in range(2):
            expected, state = norms.unmix_tns(
                x,
                state,
                source.scale[...],
                source.bias[...],
                momentum=0.3,
                epsilon=0.1,
                cross_variance=True,
            )
            y = nnx.jit(lambda norm, x: norm(x))(norm, x)
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        for name, value in state._asdict().items():
            assert isinstance(norm.state[name], nnx.BatchStat)
            np.testing.assert_allclose(norm.state[name][...], value, rtol=1e-5, atol=1e-6)

    def test_without_positions_it_keeps_the_statistics_of_training(self):
        source, x = trained(), inputs((5, 3))
        norm = UnMixNorm(source, rngs=nnx.Rngs(0))
        source.eval()
        before = norm.state["means"][...]
        np.testing.assert_allclose(norm(x), source(x), rtol=1e-5)
        np.testing.assert_array_equal(norm.state["means"][...], before)

    def test_gradients_reach_the_parameters_and_layers_draw_their_own(self):
        rngs = nnx.Rngs(0)
        one, other = (UnMixNorm(trained(), rngs=rngs) for _ in range(2))
        assert np.all(one.state["means"][...] != other.state["means"][...])
        grads = nnx.grad(lambda norm: jnp.sum(norm(inputs()) ** 2))(one)
        assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(grads))
        assert set(nnx.to_pure_dict(grads)) == {"scale", "bias"}


@pytest.mark.parametrize(
    "function", [norms.layer_norm, partial(norms.batch_channel_norm, groups=1)]
)
def test_other_norms_raise(function):
    norm = Norm(function, 3)
    with pytest.raises(ValueError, match="norm must be a Norm with batch statistics, got one of"):
        AlphaBatchNorm(norm)
    with pytest.raises(ValueError, match="norm must be a Norm with batch statistics, got one of"):
        UnMixNorm(norm, rngs=nnx.Rngs(0))
