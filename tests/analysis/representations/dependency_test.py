from pathlib import Path

import jax
import numpy as np
import pytest

from jaxref.analysis import exact_wasserstein_dependency, mutual_information

PEER = np.load(Path(__file__).parents[2] / "oracles" / "dependency.npz")


class TestMutualInformation:
    def test_matches_the_formula(self):
        information = jax.jit(jax.value_and_grad(mutual_information))
        p = PEER["joint_0"].astype("f")
        expected = np.sum(p * np.log(p / (p.sum(1, keepdims=True) * p.sum(0))))
        np.testing.assert_allclose(information(p)[0], expected, rtol=1e-4)
        value, slope = information(np.eye(3, 4, dtype="f") / 3)
        np.testing.assert_allclose(value, np.log(3), rtol=1e-5)
        assert np.all(np.isfinite(slope))
        assert information(np.ones((3, 4), "f") / 12)[0] < 1e-6


class TestWassersteinDependency:
    @pytest.mark.parametrize("case", [0, 1])
    def test_matches_pot_and_its_critic_attains_it(self, case):
        joint, *costs = (PEER[f"{name}_{case}"] for name in ("joint", "x_cost", "y_cost"))
        value, critic = exact_wasserstein_dependency(joint, *costs)
        np.testing.assert_allclose(value, PEER[f"value_{case}"], rtol=1e-6)
        difference = joint - joint.sum(1, keepdims=True) * joint.sum(0)
        np.testing.assert_allclose(np.sum(difference * critic), value, rtol=1e-6)
        apart = costs[0][:, None, :, None] + costs[1][None, :, None, :]
        assert np.all(critic[:, :, None, None] - critic <= apart + 1e-9)

    def test_bad_input_is_named(self):
        joint, cost = np.eye(2) / 2, 1 - np.eye(2)
        with pytest.raises(ValueError, match=r"joint must have shape \[n, m\]"):
            mutual_information(joint[0])
        for bad in (2 * joint, np.array([[1.5, -0.5], [0.0, 0.0]])):
            with pytest.raises(ValueError, match="joint must be at least 0 and of sum 1"):
                exact_wasserstein_dependency(bad, cost, cost)
        with pytest.raises(ValueError, match=r"y_cost must have shape \(2, 2\)"):
            exact_wasserstein_dependency(joint, cost, np.zeros((3, 3)))
        with pytest.raises(ValueError, match="x_cost must be at least 0"):
            exact_wasserstein_dependency(joint, cost + 1, cost)
