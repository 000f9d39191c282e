from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxref import metrics


def test_pass_at_n_is_precise_for_small_and_certain_answers():
    p = np.array([0.0, 1e-9, 0.1, 1.0])
    for n in (1, 2.5, 1000):
        ours = jax.jit(metrics.pass_at_n, static_argnames="n")(p.astype("f"), n)
        np.testing.assert_allclose(ours, [0, n * 1e-9, 1 - 0.9**n, 1], rtol=1e-5)
    assert metrics.pass_at_n(jnp.zeros(2, jnp.bfloat16), 4).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="n must be in"):
        metrics.pass_at_n(p, 0)
    with pytest.raises(TypeError, match="probabilities must have a floating-point type"):
        metrics.pass_at_n(np.zeros(2, int), 1)


def test_unbiased_pass_at_k_counts_the_subsets():
    n = 6
    for c in range(n + 1):
        right = np.arange(n) < c
        for k in range(1, n + 1):
            found = np.mean([right[list(subset)].any() for subset in combinations(range(n), k)])
            assert metrics.unbiased_pass_at_k(n, c, k) == pytest.approx(found, abs=1e-12)
    many = metrics.unbiased_pass_at_k([10**6, 10**5], [3, 2], 1000)
    np.testing.assert_allclose(many, [1 - 0.999**3, 1 - 0.99**2], rtol=1e-2)
    for arguments, name in (
        ((5, 2, 0), "k"),
        ((5, 2, 6), "num_samples"),
        ((5, -1, 2), "num_correct"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be in"):
            metrics.unbiased_pass_at_k(*arguments)
    with pytest.raises(ValueError, match="num_wrong must be in"):
        metrics.unbiased_pass_at_k(5, 6, 2)


class TestOptimalPolicy:
    def test_matches_a_solver_and_is_flatter_for_more_samples(self):
        rng = np.random.default_rng(0)
        for n in (2, 4, 16):
            w = rng.dirichlet(np.ones(5))
            ours = metrics.optimal_coverage_policy(w, n)
            solved = scipy.optimize.minimize(
                lambda p: -np.sum(w * (1 - (1 - p) ** n)),
                np.full(5, 0.2),
                bounds=[(0, 1)] * 5,
                constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
                tol=1e-12,
            )
            np.testing.assert_allclose(ours, solved.x, atol=2e-4)
            np.testing.assert_allclose(ours.sum(), 1, rtol=1e-12)
        w = np.array([0.5, 0.3, 0.15, 0.05])
        policies = metrics.optimal_coverage_policy(np.stack([w, w]), 4)
        np.testing.assert_allclose(policies, [[0.456, 0.356, 0.188, 0]] * 2, atol=5e-4)
        covered = [np.sum(w * np.array(metrics.pass_at_n(p, 4))) for p in (policies[0], w)]
        np.testing.assert_allclose(covered, [0.789, 0.778], atol=1e-3)
        tops = [metrics.optimal_coverage_policy(w, n)[0] for n in (1, 2, 8, 1e6)]
        assert tops == sorted(tops, reverse=True)
        assert tops[0] == 1
        assert tops[-1] == pytest.approx(0.25, abs=1e-4)

    def test_edges_and_bad_input(self):
        policy = metrics.optimal_coverage_policy
        np.testing.assert_allclose(policy([2.0, 2.0, 0.0], 1), [0.5, 0.5, 0])
        np.testing.assert_allclose(policy([1.0, 0.0, 0.0], 3), [1, 0, 0])
        np.testing.assert_allclose(policy([7.0], 3), [1])
        np.testing.assert_allclose(policy([1e-300, 1.0], 1.001), [0, 1])
        with pytest.raises(ValueError, match="weights must not be all 0"):
            policy([[0.0, 0.0], [1.0, 0.0]], 2)
        with pytest.raises(ValueError, match="weights must be in"):
            policy([-1.0, 2.0], 2)
        with pytest.raises(ValueError, match="n must be in"):
            policy([1.0], 0.5)
