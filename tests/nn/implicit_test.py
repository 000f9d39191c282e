import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.nn import (
    diffusion_sorption_residual,
    hard_constraint_mixture_of_experts,
    hard_constraint_solve,
    merge_domain,
    partition_domain,
)


def logistic_equation(theta, x):
    """Basis of polynomials whose shape θ sets, and their derivatives, for u' = u (1 - u)."""
    function = lambda x: jnp.stack([jnp.ones_like(x), x, jnp.sin(theta * x), x**2], -1)
    return {"u": function(x), "u_x": jax.vmap(jax.jacfwd(function))(x)}


def logistic_residual(at):
    return {"equation": at["u_x"] - at["u"] * (1 - at["u"]), "start": 10 * (at["u"][:1] - 0.2)}


class TestHardConstraint:
    def test_linear_problem_is_ridge_regression_with_its_derivative(self):
        rng = np.random.default_rng(0)
        a, y, ridge = rng.normal(size=(20, 4)), rng.normal(size=20), 0.3

        def solved(a, y):
            w, info = hard_constraint_solve(a, lambda u: u - y, ridge=ridge, tolerance=1e-12)
            return w, info

        def closed(a, y):
            return jnp.linalg.solve(a.T @ a + ridge**2 * jnp.eye(4), a.T @ y)

        with jax.enable_x64(True):
            w, vjp, info = jax.vjp(jax.jit(solved), a, y, has_aux=True)
            expected, expected_vjp = jax.vjp(closed, a, y)
            assert info.converged
            np.testing.assert_allclose(w, expected, rtol=1e-6)
            cotangent = rng.normal(size=4)
            for ours, theirs in zip(vjp(cotangent), expected_vjp(cotangent)):
                np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)

    def test_implicit_gradient_of_an_equation_matches_finite_differences(self):
        x = np.linspace(0, 2, 15)

        def loss(theta):
            w, info = hard_constraint_solve(
                logistic_equation(theta, jnp.asarray(x)),
                logistic_residual,
                ridge=0.1,
                tolerance=1e-12,
            )
            return jnp.sum(jnp.sin(w)), info

        with jax.enable_x64(True):
            (_, info), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(1.3)
            assert info.converged
            ends = [jax.jit(loss)(1.3 + step)[0] for step in (1e-3, -1e-3)]
            forward = jax.jit(lambda t: jax.jvp(lambda t: loss(t)[0], (t,), (1.0,))[1])(1.3)
            np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-3, rtol=1e-4)
            np.testing.assert_allclose(forward, slope, rtol=1e-8)

    def test_unconverged_solves_say_so_and_return_the_last_iterate(self):
        basis = logistic_equation(1.3, jnp.linspace(0.0, 2.0, 15))
        start = jnp.array([5.0, -5.0, 5.0, 5.0])
        w, info = hard_constraint_solve(basis, logistic_residual, start, max_steps=2)
        assert not info.converged
        assert info.steps == 2
        assert np.all(np.isfinite(w))


class TestPartition:
    @pytest.mark.parametrize("num_experts", [(1, 1), (2, 1), (1, 3), (2, 3), (4,)])
    def test_merging_undoes_partitioning(self, num_experts):
        array = np.arange(4 * 6 * 5).reshape(4, 6, 5)
        blocks = partition_domain(array, num_experts)
        assert blocks.shape[0] == np.prod(num_experts)
        np.testing.assert_array_equal(merge_domain(blocks, num_experts), array)
        if num_experts == (2, 3):
            np.testing.assert_array_equal(blocks[4], array[2:, 2:4])


def mesh(n=8):
    """Functions of (t, x) with derivatives, for the heat equation with a reaction term."""
    t, x = jnp.meshgrid(jnp.linspace(0, 1, n), jnp.linspace(0, 1, n), indexing="ij")

    def function(t, x):
        return jnp.stack([jnp.ones_like(x), t, x, t * x, jnp.sin(3 * x) * jnp.exp(-t)])

    at = lambda f: jax.vmap(jax.vmap(f))(t, x)
    terms = {
        "u": at(function),
        "u_t": at(jax.jacfwd(function)),
        "u_xx": at(jax.jacfwd(jax.jacfwd(function, 1), 1)),
    }
    return terms, jnp.cos(5 * x) * (1 + t)


def reaction(at, shared, forcing):
    return at["u_t"] - 0.1 * at["u_xx"] + at["u"] ** 2 - forcing, shared - 0.5


class TestClaims:
    @pytest.mark.claim("hard-constraint-mixture-of-experts")
    def test_experts_satisfy_the_equation_on_their_blocks_better_than_one_solve_does(self):
        terms, forcing = mesh()
        boundary = terms["u"][:, 0]

        @jax.jit
        def solve(boundary, forcing):
            residuals, weights = {}, {}
            for pieces in ((1, 1), (2, 2)):
                _, weights[pieces], info = hard_constraint_mixture_of_experts(
                    terms["u"], terms, reaction, pieces, shared_terms=boundary, data=forcing
                )
                residuals[pieces] = info.cost
            whole, info = hard_constraint_solve(
                (terms, boundary), lambda at: reaction(at[0], at[1], forcing)
            )
            return residuals, weights, whole

        residuals, weights, whole = solve(boundary, forcing)
        # one expert is the plain constraint
        np.testing.assert_allclose(weights[1, 1][0], whole, rtol=1e-3, atol=1e-3)
        # the boundary conditions of all experts are among the costs, so that this is no identity
        assert residuals[2, 2].sum() < 0.5 * residuals[1, 1].sum()
        # an expert sees its block and what is shared alone
        _, changed, _ = solve(boundary, forcing.at[0, 0].add(1.0))
        np.testing.assert_array_equal(changed[2, 2][1:], weights[2, 2][1:])
        assert not np.allclose(changed[2, 2][0], weights[2, 2][0], rtol=1e-3)
        _, changed, _ = solve(1.5 * boundary, forcing)
        assert np.all(np.abs(changed[2, 2] - weights[2, 2]).max(-1) > 1e-3)

    def test_solution_and_experts_split_over_devices(self):
        terms, forcing = mesh()

        @jax.jit
        def solve(terms, forcing):
            return hard_constraint_mixture_of_experts(
                terms["u"],
                terms,
                reaction,
                (8, 1),
                shared_terms=terms["u"][:, 0],
                data=forcing,
                ridge=0.1,
                tolerance=1e-5,
            )

        u, weights, info = solve(terms, forcing)
        assert info.converged.shape == (8,)
        for i in range(8):
            np.testing.assert_allclose(u[i], terms["u"][i] @ weights[i], rtol=1e-5, atol=1e-5)
        grid = jax.make_mesh((8,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
        placed = jax.device_put((terms, forcing), NamedSharding(grid, P("t")))
        np.testing.assert_allclose(solve(*placed)[0], u, rtol=5e-3, atol=1e-3)


class TestDiffusionSorption:
    def test_matches_the_formula_with_finite_gradients_at_zero(self):
        u, u_t, u_xx = np.random.default_rng(0).uniform(0.1, 1, size=(3, 5))
        retardation = 1 + 0.71 / 0.29 * 2880 * 3.5e-4 * 0.874 * (u + 1e-6) ** (0.874 - 1)
        expected = u_t - 5e-4 / retardation * u_xx
        arrays = [a.astype("f") for a in (u, u_t, u_xx)]
        np.testing.assert_allclose(diffusion_sorption_residual(*arrays), expected, rtol=1e-5)
        edge = np.array([0.0, -1.0, 1e4], "f")
        slopes = jax.grad(lambda u: diffusion_sorption_residual(u, edge, edge).sum())(edge)
        assert np.all(np.isfinite(slopes))
        with pytest.raises(ValueError, match="porosity must be in"):
            diffusion_sorption_residual(*arrays, porosity=1.0)
        with pytest.raises(ValueError, match=r"u_t must have shape \(5,\)"):
            diffusion_sorption_residual(arrays[0], arrays[1][:3], arrays[2])


def test_bad_input_is_named():
    basis = np.ones((4, 3), "f")
    identity = lambda u: u
    with pytest.raises(ValueError, match="basis must be arrays"):
        hard_constraint_solve({"u": basis, "v": basis[:, :2]}, identity)
    with pytest.raises(ValueError, match="basis must be arrays"):
        hard_constraint_solve({}, identity)
    with pytest.raises(TypeError, match="floating-point"):
        hard_constraint_solve(basis.astype(int), identity)
    with pytest.raises(ValueError, match=r"w0 must have shape \(3,\)"):
        hard_constraint_solve(basis, identity, np.ones(2, "f"))
    with pytest.raises(ValueError, match="ridge must be in"):
        hard_constraint_solve(basis, identity, ridge=0.0)
    with pytest.raises(ValueError, match="num_experts must divide the leading axes"):
        partition_domain(basis, (3,))
    with pytest.raises(ValueError, match="num_experts must be in"):
        partition_domain(basis, (0,))
    with pytest.raises(ValueError, match="blocks must have shape"):
        merge_domain(basis, (3,))
