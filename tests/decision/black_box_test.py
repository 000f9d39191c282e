import jax
import numpy as np
import pytest

from jaxref.decision import Gaussian, cross_entropy_search

SPACE = {
    "x": Gaussian(0.0, 3.0),
    "y": Gaussian(0.0, 3.0),
    "kind": ("a", "b", "c", "d"),
}


def objective(at):
    """A quadratic whose centre depends on the choice; "c" has the least minimum."""
    offset = {"a": 2.0, "b": 1.0, "c": 0.0, "d": 3.0}[at["kind"]]
    return (at["x"] - 1.5 - offset) ** 2 + 4 * (at["y"] + 0.5) ** 2 + offset


class TestSearch:
    """The marked claim of the paper is beside its attention."""

    @pytest.mark.parametrize("seed", range(3))
    def test_finds_the_optimum_of_a_mixed_function_in_twenty_rounds(self, seed):
        found = cross_entropy_search(jax.random.key(seed), objective, SPACE)
        assert found.best["kind"] == "c"
        np.testing.assert_allclose([found.best["x"], found.best["y"]], [1.5, -0.5], atol=0.1)
        assert found.value == objective(found.best)
        assert found.value <= min(found.thresholds)
        assert len(found.thresholds) <= 20
        assert found.distributions["kind"].argmax() == 2
        np.testing.assert_allclose(found.distributions["kind"].sum(), 1)
        assert found.distributions["x"].std < 1

    def test_one_round_is_a_fit_to_the_elite(self):
        seen = []

        def record(at):
            seen.append((objective(at), at["x"], at["kind"]))
            return seen[-1][0]

        found = cross_entropy_search(
            jax.random.key(0), record, SPACE, num_samples=20, elite_fraction=0.25, num_iterations=1
        )
        elite = sorted(seen)[:5]
        assert found.thresholds == (elite[-1][0],)
        assert found.value == elite[0][0]
        x = np.array([at[1] for at in elite])
        mean, std = found.distributions["x"]
        np.testing.assert_allclose(mean, 0.7 * x.mean())
        np.testing.assert_allclose(std, 0.7 * x.std() + 0.3 * 3)
        share = [sum(at[2] == kind for at in elite) / 5 for kind in SPACE["kind"]]
        np.testing.assert_allclose(found.distributions["kind"], 0.7 * np.array(share) + 0.3 / 4)

    def test_stops_when_the_threshold_stalls(self):
        found = cross_entropy_search(jax.random.key(0), lambda at: 0.0, SPACE)
        assert len(found.thresholds) == 6
        first, second = (cross_entropy_search(jax.random.key(0), objective, SPACE) for _ in "ab")
        assert first.best == second.best

    def test_values_that_are_no_numbers_are_never_best(self):
        found = cross_entropy_search(
            jax.random.key(0), lambda at: at["x"] if at["x"] > 1 else float("nan"), SPACE
        )
        assert 1 < found.best["x"] < 1.1
        nothing = cross_entropy_search(jax.random.key(0), lambda at: float("nan"), SPACE)
        assert nothing.value == np.inf
        assert nothing.best


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {}}, "space must have at least one parameter"),
        ({"space": {"a": ()}}, r"space\['a'\] must have at least one choice"),
        ({"space": {"a": Gaussian(0.0, 0.0)}}, "std must be in"),
        ({"num_samples": 0}, "num_samples must be in"),
        ({"elite_fraction": 0.0}, "elite_fraction must be in"),
        ({"smoothing": 1.1}, "smoothing must be in"),
        ({"num_iterations": 0}, "num_iterations must be in"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"key": jax.random.key(0), "objective": lambda at: 0.0, "space": SPACE} | change
    with pytest.raises(ValueError, match=message):
        cross_entropy_search(**arguments)
