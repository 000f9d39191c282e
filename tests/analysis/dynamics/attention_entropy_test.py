import numpy as np
import pytest

from jaxref.analysis import plot_attention_entropy


def test_draws_each_run_the_limit_and_the_range_of_layers():
    runs = {"plain": [2.0, 1.0, 0.1], "layers": [[2.0, 1.9], [1.5, 1.8], [1.2, 1.7]]}
    ax = plot_attention_entropy(runs, 8, steps=[0, 10, 20])
    plain, layers, limit = ax.get_lines()
    np.testing.assert_array_equal(plain.get_xdata(), [0, 10, 20])
    np.testing.assert_array_equal(plain.get_ydata(), runs["plain"])
    np.testing.assert_array_equal(layers.get_ydata(), [1.9, 1.5, 1.2])
    assert [line.get_label() for line in (plain, layers)] == list(runs)
    np.testing.assert_allclose(limit.get_ydata(), np.log(8))
    (band,) = ax.collections
    assert band.get_paths()[0].get_extents().ymax == 2.0
    assert ax.get_ylim()[0] == 0
    assert plot_attention_entropy(runs, 8, ax=ax) is ax


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="curves must hold at least one run"):
        plot_attention_entropy({}, 8)
    with pytest.raises(ValueError, match="num_keys must be in"):
        plot_attention_entropy({"a": [1.0]}, 0)
    with pytest.raises(ValueError, match=r"curves\['a'\] must have shape \[steps\]"):
        plot_attention_entropy({"a": 1.0}, 8)
    with pytest.raises(ValueError, match=r"steps must have shape \(2,\)"):
        plot_attention_entropy({"a": [1.0, 2.0]}, 8, steps=[1])
