import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.sparse.linalg import eigsh

from jaxref.analysis.landscape.lanczos import stochastic_lanczos


def symmetric(size=60, seed=0):
    """With eigenvalues of both signs and a few that stand out."""
    matrix = np.random.default_rng(seed).normal(size=(size, size)) / np.sqrt(2 * size)
    return np.float32(matrix + matrix.T + np.diag(np.r_[8.0, 5.0, -6.0, np.zeros(size - 3)]))


def spectrum_of(matrix, key, *, num_steps, num_probes=1):
    """Of a matrix, through a tree of parameters in two shapes."""
    size = matrix.shape[0]
    params = {"w": jnp.zeros((2, size // 4)), "b": jnp.zeros(size - 2 * (size // 4))}

    def hvp(v):
        flat = matrix @ jnp.concatenate([v["b"], v["w"].ravel()])
        split = size - 2 * (size // 4)
        return {"b": flat[:split], "w": flat[split:].reshape(2, -1)}

    return stochastic_lanczos(hvp, params, num_steps=num_steps, num_probes=num_probes, key=key)


run = jax.jit(spectrum_of, static_argnames=("num_steps", "num_probes"))


def lanczos64(matrix, start, steps):
    """Nodes and weights from an orthonormal basis of the Krylov space, by QR."""
    matrix = np.float64(matrix)
    basis = [start / np.linalg.norm(start)]
    for _ in range(steps - 1):
        w = matrix @ basis[-1]
        for _ in range(3):
            w -= sum((q @ w) * q for q in basis)
        basis.append(w / np.linalg.norm(w))
    q = np.array(basis)
    nodes, vectors = np.linalg.eigh(q @ matrix @ q.T)
    return nodes, vectors[0] ** 2


class TestStochasticLanczos:
    def test_as_many_steps_as_parameters_give_every_eigenvalue(self):
        matrix = symmetric()
        spectrum = run(matrix, jax.random.key(0), num_steps=60, num_probes=3)
        exact = np.linalg.eigvalsh(np.float64(matrix))
        assert spectrum.nodes.shape == spectrum.weights.shape == (3, 60)
        for nodes in spectrum.nodes:
            np.testing.assert_allclose(nodes, exact, atol=1e-5)
        np.testing.assert_allclose(np.sum(spectrum.weights), 1, rtol=1e-5)
        more = run(matrix[:8, :8], jax.random.key(0), num_steps=20)
        assert more.nodes.shape == (1, 8)
        np.testing.assert_allclose(more.nodes[0], np.linalg.eigvalsh(matrix[:8, :8]), atol=1e-5)

    def test_few_steps_match_a_float64_basis_and_the_extremes_arpack(self):
        matrix, key = symmetric(), jax.random.key(1)
        spectrum = run(matrix, key, num_steps=14)
        start = np.float64(jax.random.normal(jax.random.split(key, 1)[0], 60))
        nodes, weights = lanczos64(matrix, start, 14)
        np.testing.assert_allclose(spectrum.nodes[0], nodes, atol=1e-4)
        np.testing.assert_allclose(spectrum.weights[0], weights, atol=1e-4)
        for extreme, which in ((spectrum.ritz_max, "LA"), (spectrum.ritz_min, "SA")):
            expected = eigsh(np.float64(matrix), 1, which=which, return_eigenvectors=False)[0]
            np.testing.assert_allclose(extreme, expected, rtol=1e-4)
            assert np.abs(extreme) <= np.abs(expected) * (1 + 1e-6)

    def test_the_probes_together_have_the_moments_of_the_matrix(self):
        """Each node is a point of the density, with the weight that a polynomial needs."""
        matrix = symmetric()
        nodes, weights, *_ = run(matrix, jax.random.key(2), num_steps=3, num_probes=400)
        power = np.float64(matrix)
        for k in range(1, 6):
            moments = np.sum(weights * nodes**k, axis=1) * 400
            deviation = np.std(moments) / np.sqrt(400)
            assert np.abs(np.mean(moments) - np.trace(power) / 60) < 4 * deviation
            assert deviation < np.std(np.linalg.eigvalsh(power))
            power = power @ matrix

    def test_no_ghosts_among_many_steps(self):
        """Without orthogonal vectors, the large eigenvalue comes up again and again."""
        matrix = np.diag(np.r_[1e3, 1e2, 10.0, np.linspace(0.1, 1, 97)]).astype(np.float32)
        nodes = run(matrix, jax.random.key(0), num_steps=60).nodes[0]
        assert np.sum(nodes > 2) == 3
        np.testing.assert_allclose(nodes[-3:], [10, 100, 1000], rtol=1e-4)

    def test_an_exhausted_space_ends_early(self):
        root = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
        matrices = np.stack([root @ root.T, 1e25 * root @ root.T, 0 * np.eye(40), np.eye(40)])
        many = jax.jit(jax.vmap(lambda m, k: spectrum_of(m, k, num_steps=12), (0, None)))
        spectra = many(np.float32(matrices), jax.random.key(3))
        np.testing.assert_allclose(np.sum(spectra.weights, axis=(1, 2)), 1, rtol=1e-5)
        exact = np.linalg.eigvalsh(matrices[0])[-3:]
        for i, scale in ((0, 1.0), (1, 1e25)):
            nodes, weights = spectra.nodes[i, 0], spectra.weights[i, 0]
            np.testing.assert_allclose(spectra.ritz_max[i] / scale, exact[-1], rtol=1e-5)
            assert np.abs(spectra.ritz_min[i]) < 1e-4 * scale * exact[-1]
            np.testing.assert_allclose(nodes[weights > 0][-3:] / scale, exact, rtol=1e-4)
            assert 4 <= np.sum(weights > 0) < 8  # the matrix has rank 3 up to rounding
        for i, value in ((2, 0.0), (3, 1.0)):
            np.testing.assert_allclose(spectra.nodes[i], value, atol=1e-6)

    def test_half_precision_parameters_give_float32_nodes(self):
        scale = {"w": jnp.arange(1.0, 9.0, dtype=jnp.bfloat16), "b": jnp.bfloat16(20.0)}

        def hvp(v):
            assert {leaf.dtype for leaf in jax.tree.leaves(v)} == {jnp.dtype(jnp.bfloat16)}
            return jax.tree.map(jnp.multiply, scale, v)

        spectrum = jax.jit(
            lambda key: stochastic_lanczos(hvp, scale, num_steps=9, num_probes=2, key=key)
        )(jax.random.key(0))
        assert spectrum.nodes.dtype == spectrum.weights.dtype == jnp.float32
        np.testing.assert_allclose(spectrum.ritz_max, 20, rtol=1e-2)
        np.testing.assert_allclose(spectrum.ritz_min, 1, atol=0.1)

    def test_what_is_not_finite_is_not_hidden(self):
        matrix = symmetric()
        matrix[3, 3] = np.nan
        assert np.isnan(run(matrix, jax.random.key(0), num_steps=14).ritz_max)

    def test_parameters_and_data_over_eight_devices(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(32, 16)).astype(np.float32)
        mesh = jax.sharding.Mesh(jax.devices(), ("data",))
        w = jax.device_put(jnp.zeros(16), NamedSharding(mesh, P("data")))
        examples = jax.device_put(x, NamedSharding(mesh, P("data")))

        def spectrum(w, x, key):
            loss = lambda w: 0.5 * jnp.mean(jnp.square(x @ w))
            hvp = lambda v: jax.jvp(jax.grad(loss), (w,), (v,))[1]
            return stochastic_lanczos(hvp, w, num_steps=16, key=key)

        ours = jax.jit(spectrum)(w, examples, jax.random.key(0))
        np.testing.assert_allclose(ours.nodes[0], np.linalg.eigvalsh(x.T @ x / 32), atol=1e-4)

    def test_bad_input_is_named(self):
        key, ones = jax.random.key(0), jnp.ones(3)
        for params, hvp, keywords, error, message in [
            (ones, lambda v: v, {"num_steps": 0}, ValueError, "num_steps must be in"),
            (ones, lambda v: v, {"num_probes": 0}, ValueError, "num_probes must be in"),
            ({}, lambda v: v, {}, ValueError, "params must have at least one entry"),
            ({"a": jnp.arange(3)}, lambda v: v, {}, TypeError, r"params\['a'\] must have a fl"),
            (ones, lambda v: v[:2], {}, ValueError, r"hvp\(v\) must have shape \(3,\), got \(2,\)"),
            (ones, lambda v: {"a": v}, {}, ValueError, r"hvp\(v\) must have the tree structure"),
        ]:
            with pytest.raises(error, match=message):
                stochastic_lanczos(hvp, params, **{"num_steps": 2, "key": key, **keywords})
