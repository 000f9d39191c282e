import itertools

import numpy as np
import pytest

from jaxref.quantization import allocate_bits_integer_program


def random_layers(layers=5, seed=0):
    """Increases that fall with the bits, and bits by parameters."""
    rng = np.random.default_rng(seed)
    increase = np.sort(rng.exponential(size=(layers, 3)), axis=1)[:, ::-1].copy()
    cost = rng.integers(10, 1000, size=(layers, 1)) * np.array([2, 4, 8])
    return increase, cost


def totals(choices, increase, cost):
    layers = np.arange(len(increase))
    return increase[layers, choices].sum(-1), cost[layers, choices].sum(-1)


def every_choice(increase):
    return np.array(list(itertools.product(range(increase.shape[1]), repeat=len(increase))))


class TestIntegerProgram:
    @pytest.mark.parametrize("seed", range(4))
    def test_equals_brute_force_both_ways(self, seed):
        increase, cost = random_layers(seed=seed)
        losses, costs = totals(every_choice(increase), increase, cost)
        for share in (0.0, 0.1, 0.4, 0.7, 1.0):
            budget = costs.min() + share * (costs.max() - costs.min())
            loss, price = totals(
                allocate_bits_integer_program(increase, cost, budget), increase, cost
            )
            assert price <= budget
            np.testing.assert_allclose(loss, losses[costs <= budget].min(), rtol=1e-9)
            limit = losses.min() + share * (losses.max() - losses.min())
            choice = allocate_bits_integer_program(increase, cost, max_loss_increase=limit)
            loss, price = totals(choice, increase, cost)
            assert loss <= limit * (1 + 1e-9)
            assert price == costs[losses <= limit * (1 + 1e-9)].min()

    def test_never_worse_than_even_bits_of_the_same_cost(self):
        increase, cost = random_layers(layers=40)
        for setting in range(3):
            even = totals(np.full(40, setting), increase, cost)
            ours = totals(allocate_bits_integer_program(increase, cost, even[1]), increase, cost)
            assert ours[1] <= even[1]
            assert ours[0] <= even[0]
            assert setting != 1 or ours[0] < 0.8 * even[0]

    def test_budget_is_kept_to_the_unit(self):
        """One over the budget is far below the solver's tolerance."""
        cost = np.array([[10**9, 10**9 + 1]] * 2)
        increase = np.array([[1.0, 0.1], [1.0, 0.2]])
        np.testing.assert_array_equal(
            allocate_bits_integer_program(increase, cost, 2 * 10**9 + 1), [1, 0]
        )
        np.testing.assert_array_equal(
            allocate_bits_integer_program(increase, cost, 2 * 10**9), [0, 0]
        )

    def test_a_choice_within_the_tolerance_of_the_solver_only_is_not_taken(self):
        increase, cost = np.array([[1.0, 0.0], [0.5, 0.0]]), np.array([[0, 10**12], [0, 50]])
        np.testing.assert_array_equal(allocate_bits_integer_program(increase, cost, 10**12), [1, 0])

    def test_gains_that_are_noise_do_not_count(self):
        """Fewer bits in one layer cannot pay for the damage of another."""
        increase, cost = np.array([[-5.0, 0.0], [0.3, 0.0]]), np.array([[1, 2], [1, 2]])
        choice = allocate_bits_integer_program(increase, cost, max_loss_increase=0.1)
        np.testing.assert_array_equal(choice, [0, 1])

    def test_one_layer_one_setting_and_no_cost(self):
        zero = np.zeros((1, 1))
        np.testing.assert_array_equal(allocate_bits_integer_program(zero, zero, 0), [0])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"budget": 5}, "budget must be at least"),
            ({"budget": None, "max_loss_increase": 0.0}, "max_loss_increase must be at least"),
            ({"budget": None}, "one of budget and max_loss_increase must be given"),
            ({"max_loss_increase": 1.0}, "one of budget and max_loss_increase must be given"),
            ({"cost": np.ones((2, 3))}, r"cost must have shape \(5, 3\)"),
            ({"cost": -np.ones((5, 3))}, "cost must be in"),
            ({"loss_increase": np.full((5, 3), np.nan)}, "loss_increase must be in"),
            ({"loss_increase": np.ones(3)}, r"loss_increase must have shape \[layers, settings\]"),
        ],
    )
    def test_bad_input_is_named(self, change, message):
        increase, cost = random_layers()
        arguments = {"loss_increase": increase, "cost": cost, "budget": 1e5} | change
        with pytest.raises(ValueError, match=message):
            allocate_bits_integer_program(**arguments)
