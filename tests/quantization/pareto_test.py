import itertools

import numpy as np
import pytest

from jaxref.quantization import allocate_bits_integer_program, pareto_bit_allocation

CHOICES = np.array([2, 4, 8])


def problem(layers, seed):
    rng = np.random.default_rng(seed)
    sensitivity = np.sort(rng.uniform(size=(layers, 3)), axis=1)[:, ::-1]
    return sensitivity * rng.uniform(0.1, 10, (layers, 1)), rng.integers(10, 1000, layers)


class TestParetoBitAllocation:
    def test_is_the_frontier_of_all_choices(self):
        for seed in range(3):
            sensitivity, sizes = problem(5, seed)
            every = np.array(list(itertools.product(range(3), repeat=5)))
            losses = sensitivity[np.arange(5), every].sum(axis=1)
            costs = (sizes * CHOICES[every]).sum(axis=1)
            for budget in (costs.min(), np.quantile(costs, 0.3), np.median(costs), costs.max() + 1):
                best = pareto_bit_allocation(sensitivity, sizes, CHOICES, budget)
                inside = np.flatnonzero(costs <= budget)
                least = inside[losses[inside].argmin()]
                np.testing.assert_array_equal(best.bits, CHOICES[every[least]])
                np.testing.assert_allclose(best.sensitivity, losses[least])
                assert best.size == costs[least]
            assert (np.diff(best.frontier_sizes) > 0).all()
            assert (np.diff(best.frontier_sensitivities) < 0).all()
            np.testing.assert_array_equal(best.frontier_bits @ sizes, best.frontier_sizes)
            undominated = [
                not np.any((costs <= c) & (losses <= v) & ((costs < c) | (losses < v)))
                for c, v in zip(costs, losses)
            ]
            assert best.frontier_sizes.size == np.unique(costs[undominated]).size

    def test_agrees_with_the_integer_programme_on_many_layers(self):
        sensitivity, sizes = problem(30, 7)
        budget = 4.5 * sizes.sum()
        best = pareto_bit_allocation(sensitivity, sizes, CHOICES, budget)
        exact = allocate_bits_integer_program(sensitivity, np.outer(sizes, CHOICES), budget)
        np.testing.assert_array_equal(best.bits, CHOICES[exact])

    def test_edges(self):
        alone = pareto_bit_allocation([[0.0, 0.0]], [0], [2, 8], 0)
        assert alone.frontier_sizes.tolist() == [0.0]
        assert alone.bits.tolist() == [2]
        worse_with_more = pareto_bit_allocation([[0.1, 0.2]], [1], [2, 8], 100)
        assert worse_with_more.bits.tolist() == [2]
        with pytest.raises(ValueError, match="budget must be at least 20, got 19"):
            pareto_bit_allocation([[1.0, 0.0]], [10], [2, 8], 19)
        with pytest.raises(ValueError, match="sensitivity must have shape"):
            pareto_bit_allocation([1.0], [1], [2], 9)
        with pytest.raises(ValueError, match="sensitivity must be in"):
            pareto_bit_allocation([[np.nan]], [1], [2], 9)
        with pytest.raises(ValueError, match="sizes must have shape"):
            pareto_bit_allocation([[1.0]], [1, 2], [2], 9)
        with pytest.raises(ValueError, match="choices must be in"):
            pareto_bit_allocation([[1.0]], [1], [0], 9)
