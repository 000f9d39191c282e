import jax
import numpy as np
import pytest
from sklearn.datasets import make_moons

from jaxref.data import two_moons_shortcut

moons = jax.jit(two_moons_shortcut, static_argnames="num_samples")


def literal(n, margin):
    """As the authors move, fold and turn scikit-learn's moons, step by step."""
    points, y = make_moons(n_samples=n, noise=0.1, random_state=0)
    t = 2 * y - 1
    across, height = points[:, 0] - 0.5, points[:, 1] - 0.3 * t
    height = height - height.mean()
    height = height * np.sign(-height * t) - t * margin
    return np.stack([height, across], axis=-1), y


@pytest.mark.parametrize("margin", [0.1, -0.1])
def test_is_distributed_as_the_authors_data(margin):
    x, y = (np.asarray(part) for part in moons(4000, key=jax.random.key(0), margin=margin))
    theirs, labels = literal(4000, margin)
    assert y.sum() == 2000
    for label in (0, 1):
        ours, expected = x[y == label], theirs[labels == label]
        levels = np.linspace(0.05, 0.95, 7)
        np.testing.assert_allclose(
            np.quantile(ours, levels, axis=0), np.quantile(expected, levels, axis=0), atol=0.06
        )
        np.testing.assert_allclose(np.cov(ours.T), np.cov(expected.T), atol=0.03)


def test_margin_order_and_sizes():
    x, y = moons(101, key=jax.random.key(1), margin=0.2)
    assert x.shape == (101, 2)
    assert y.sum() == 50
    assert np.all(np.where(y == 1, -x[:, 0], x[:, 0]) >= 0.2)
    assert 20 < np.sum(np.diff(y) != 0) < 80  # in random order
    still, labels = moons(4, key=jax.random.key(2), margin=0.0, noise=0.0)
    np.testing.assert_allclose(np.sort(still[labels == 0, 1]), [-1.5, 0.5], atol=1e-6)


def test_bad_input_is_named():
    for options, message in (
        ({"num_samples": 1}, "num_samples must be in"),
        ({"num_samples": 4, "noise": -1.0}, "noise must be in"),
        ({"num_samples": 4, "margin": np.nan}, "margin must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            two_moons_shortcut(**options, key=jax.random.key(0))
