import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.kernels.implementation import choose_implementation
from jaxref.kernels.row_function import RowFunction
from jaxref.kernels.rows import apply_rows
from tests.kernels.platforms import ANYWHERE, small_tiles  # noqa: F401


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("shape", [(3, 3, 150), (21, 40)])
def test_sums_are_over_the_rows_that_exist(implementation, shape):
    """Of a function that gives rows that do not exist something else than 0."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.bfloat16)
    function = RowFunction(
        "affine",
        write=lambda tile, _: (2 * tile.values[0],),
        num_sums=2,
        add_up=lambda tile, _: (tile.values[0] + 1, jnp.ones_like(tile.values[0])),
    )
    for dtypes in ((), (x.dtype,)):
        run = function if dtypes else function._replace(write=RowFunction("none").write)
        (*written, total, count), statistics = apply_rows(
            run, (x,), dtypes=dtypes, implementation=choose_implementation(implementation)
        )
        assert statistics == ()
        assert total.dtype == count.dtype == jnp.float32
        rows = np.float64(x).reshape(-1, shape[-1])
        np.testing.assert_array_equal(count, np.full(shape[-1], len(rows)))
        np.testing.assert_allclose(total, (rows + 1).sum(0), rtol=1e-6, atol=1e-6)
        for y in written:
            np.testing.assert_array_equal(y, 2 * x)
