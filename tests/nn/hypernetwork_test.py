from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from jaxref.nn import (
    HyperNetwork,
    HyperNetworkParameters,
    hypernetwork_apply,
    magnitude_invariant_encoding,
)

AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "hyperlight_hypernet.npz")
TARGET = {"kernel": (3, 2), "bias": (2,)}


def in_our_form(case, flat):
    """Their parameters, or gradients, that lie one after the other; the last layer cut."""
    inputs = 3 if case == "none" else 6
    shapes = [(5, inputs), (5,), (4, 5), (4,), (8, 4), (8,)]
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    pieces = np.split(flat.astype("f"), ends[:-1])
    first, b1, second, b2, last, base = (p.reshape(s).T for p, s in zip(pieces, shapes))

    def cut(last):
        kernel, bias = np.split(last, [6], axis=-1)
        return {"kernel": kernel.reshape(*kernel.shape[:-1], 3, 2), "bias": bias}

    return HyperNetworkParameters((first, second), (b1, b2), cut(last), cut(base))


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("cos_sin", "complement", "none")
    def test_values_and_gradients_match_the_authors(self, case):
        mode = None if case == "none" else case
        params = in_our_form(case, AUTHORS[f"{case}_parameters"])
        z = {name: AUTHORS[f"z_{name}"].astype("f") for name in ("b", "a")}
        apply = self.variant(lambda params, z: hypernetwork_apply(params, z, encoding=mode))
        predicted, vjp = jax.vjp(apply, params, z)
        cotangent = {name: AUTHORS[f"cotangent_{name}"].astype("f") for name in TARGET}
        slopes, z_slopes = vjp(cotangent)
        expected = in_our_form(case, AUTHORS[f"{case}_gradients"][12:])
        close = {"rtol": 1e-4, "atol": 1e-5}
        for name in TARGET:
            np.testing.assert_allclose(predicted[name], AUTHORS[f"{case}_{name}"], **close)
        chex.assert_trees_all_close(slopes, expected, **close)
        inputs = np.concatenate([z_slopes[name].ravel() for name in ("b", "a")])
        np.testing.assert_allclose(inputs, AUTHORS[f"{case}_gradients"][:12], **close)


def norms(encoding, z):
    """Norms of what a random hypernetwork adds to θ0, and of its gradient, for each z."""
    hyper = HyperNetwork(1, {"w": (20, 20)}, encoding=encoding, residual=False, rngs=nnx.Rngs(0))
    params = hyper.parameters()

    def one(z):
        predict = lambda params: hypernetwork_apply(params, z, encoding=encoding)["w"]
        slopes = jax.grad(lambda params: jnp.sum(predict(params)))(params)
        square = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(slopes.kernels))
        return jnp.linalg.norm(predict(params)), jnp.sqrt(square)

    return jax.jit(jax.vmap(one))(z)


class TestClaims:
    @pytest.mark.claim("magnitude-invariant-parametrizations")
    def test_predicted_weights_no_longer_scale_with_the_input(self):
        z = np.random.default_rng(0).uniform(size=(50, 7)).astype("f")
        code = magnitude_invariant_encoding(z)
        np.testing.assert_allclose(jnp.linalg.norm(code, axis=-1), np.sqrt(7), rtol=1e-6)
        complement = magnitude_invariant_encoding(z, "complement")
        np.testing.assert_allclose(jnp.abs(complement).sum(-1), 7, rtol=1e-6)
        sizes = np.linspace(0.05, 1, 20, dtype="f")[:, None]
        plain, plain_slopes = norms(None, sizes)
        np.testing.assert_allclose(plain, sizes[:, 0] * plain[-1], rtol=1e-4)  # proportional
        encoded, slopes = norms("cos_sin", sizes)
        assert encoded.max() / encoded.min() < 2.5
        spread = lambda x: np.std(x) / np.mean(x)
        assert spread(encoded) < spread(plain) / 2
        assert spread(slopes) < spread(plain_slopes) / 2

    def test_without_what_the_input_adds_the_target_is_its_own(self):
        trained = {"dense": [jnp.arange(6.0).reshape(2, 3), jnp.ones(3)], "scale": jnp.float32(2)}
        hyper = HyperNetwork.from_existing(trained, 2, hidden_sizes=(4,), rngs=nnx.Rngs(0))
        assert not np.allclose(hyper(jnp.array([0.3, 0.4]))["dense"][0], trained["dense"][0])
        for head in hyper.heads.values():
            head[...] = jnp.zeros_like(head[...])
        predicted = hyper(jnp.array([[0.3, 0.4], [1.0, 0.0]]))
        for i in range(2):
            chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], predicted), trained)


class TestHyperNetwork:
    def test_initial_values(self):
        hyper = HyperNetwork(3, {"kernel": (50, 40), "bias": (40,)}, (64, 400), rngs=nnx.Rngs(0))
        assert [layer.kernel.shape for layer in hyper.layers] == [(6, 64), (64, 400)]
        for layer in hyper.layers:
            size = layer.kernel.shape[1]
            np.testing.assert_allclose(jnp.std(layer.kernel[...]), np.sqrt(2 / size), rtol=0.15)
            assert not np.any(layer.bias[...])
        kernel, bias = (hyper.heads[f"['{name}']"][...] for name in ("kernel", "bias"))
        assert kernel.shape == (400, 50, 40)
        np.testing.assert_allclose(kernel.std(), np.sqrt(1 / 2000), rtol=0.05)
        np.testing.assert_allclose(bias.std(), np.sqrt(1 / 40), rtol=0.05)
        base = hyper.parameters().base
        np.testing.assert_allclose(base["kernel"].std(), np.sqrt(2 / 50), rtol=0.1)
        assert not np.any(base["bias"])
        plain = HyperNetwork(3, {"kernel": (2, 2)}, (4,), residual=False, rngs=nnx.Rngs(0))
        assert not np.any(plain.parameters().base["kernel"])

    def test_learns_a_family_of_lines(self):
        hyper = HyperNetwork(1, {"slope": (1, 1)}, (8,), rngs=nnx.Rngs(0))
        z = jnp.linspace(0.0, 1.0, 9)[:, None]
        target = 3 * z - 1
        graphdef, params = nnx.split(hyper)
        loss = lambda p: jnp.mean(jnp.square(nnx.merge(graphdef, p)(z)["slope"][..., 0] - target))
        step = lambda p, _: (jax.tree.map(lambda a, g: a - 0.05 * g, p, jax.grad(loss)(p)), None)
        trained = jax.jit(lambda p: jax.lax.scan(step, p, None, length=400)[0])(params)
        assert loss(trained) < 0.02 * loss(params)

    def test_shapes_by_arrays_and_names(self):
        abstract = [jax.ShapeDtypeStruct((2, 3), jnp.float32), (4,), ()]
        hyper = HyperNetwork(2, abstract, (5,), encoding=None, rngs=nnx.Rngs(0))
        predicted = hyper({"b": jnp.ones((7, 1)), "a": jnp.zeros((7, 1))})
        assert [x.shape for x in predicted] == [(7, 2, 3), (7, 4), (7,)]
        joined = hyper(jnp.array([[0.0, 1.0]] * 7))
        chex.assert_trees_all_equal(predicted, joined)
        mapped = jax.vmap(hyper)(jnp.array([[0.0, 1.0]] * 7))
        chex.assert_trees_all_close(mapped, predicted, rtol=1e-6, atol=1e-6)


class TestEdges:
    def test_integers_and_values_out_of_range(self):
        ends = magnitude_invariant_encoding(np.array([0, 1]))
        np.testing.assert_allclose(ends, [1, 0, 0, 1], atol=1e-6)
        with pytest.warns(UserWarning, match="outside of"):
            magnitude_invariant_encoding(np.array([2.0]))
        with pytest.raises(ValueError, match=r"z must be in \[0, 1\]"):
            magnitude_invariant_encoding(np.array([2.0]), strict=True)
        unchanged = np.array([5.0, -1.0], np.float32)
        np.testing.assert_array_equal(magnitude_invariant_encoding(unchanged, None), unchanged)
        assert magnitude_invariant_encoding(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16

    def test_bad_input_is_named(self):
        for z in (np.float32(0.5), np.zeros((3, 0), "f")):
            with pytest.raises(ValueError, match=r"z must have shape \[..., D\]"):
                magnitude_invariant_encoding(z)
        with pytest.raises(ValueError, match="mode must be"):
            magnitude_invariant_encoding(np.zeros(1, "f"), "sin")
        with pytest.raises(ValueError, match="input_dim must be"):
            HyperNetwork(0, {"w": (2,)}, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="encoding must be"):
            HyperNetwork(1, {"w": (2,)}, encoding="sin", rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="target_shapes must hold"):
            HyperNetwork(1, {}, rngs=nnx.Rngs(0))
        params = in_our_form("cos_sin", AUTHORS["cos_sin_parameters"])
        with pytest.raises(ValueError, match=r"z must have shape \(3,\), got \(2,\)"):
            hypernetwork_apply(params, np.zeros(2, "f"))
