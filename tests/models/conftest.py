"""Tiny models at little cost: real initializers and optimised programs take seconds to compile."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

# What norms start from, by the name of the field.
STATE = {
    "psi_squared": 1,
    "running_var": 1,
    **dict.fromkeys(("nu", "x2_buffer", "gz_buffer", "gz_ema", "step", "skipped"), 0),
    **dict.fromkeys(("regularizer", "auxiliary_loss"), 0),
}
ONES = {"scale", "gain", "var", "v", "batch_scale", "channel_scale"}


def _make_model(build, seed=0):
    """The model that `build` returns, its parameters random and statistics near their initial
    values; none of them is a 1 or 0 that could be lost."""
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(nnx.eval_shape(build))
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        name, shape = str(path[-1]), variable.shape
        if name in STATE:
            leaves.append((path, variable.replace(jnp.full(shape, STATE[name], variable.dtype))))
            continue
        size = 0.1 if name in ONES or len(shape) < 2 else np.prod(shape[:-1]) ** -0.5
        value = size * rng.normal(size=shape) + (name in ONES)
        leaves.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


@pytest.fixture(scope="session")
def make_model():
    """`make_model(config, seed=0)`: a model of the configuration, with random parameters."""

    def make(config, seed=0):
        return _make_model(lambda: config.build(rngs=nnx.Rngs(0)), seed)

    return make


@pytest.fixture(scope="session")
def make_module():
    """`make_module(build, seed=0)`: what `build()` returns, with random parameters."""
    return _make_model


@pytest.fixture(scope="session")
def quick_jit():
    """`jax.jit` with little optimisation."""
    return partial(
        jax.jit,
        compiler_options={
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
        },
    )


@pytest.fixture(scope="session")
def quick_apply(quick_jit):
    """`quick_apply(function, model, *arrays)` is `function(model, *arrays)`, by `quick_jit`."""

    def apply(function, model, *arrays):
        graphdef, state = nnx.split(model)
        return quick_jit(lambda state, *arrays: function(nnx.merge(graphdef, state), *arrays))(
            state, *arrays
        )

    return apply


@pytest.fixture(scope="session")
def load_oracle():
    """`load_oracle(model, case)` puts the weights of tests/oracles/image_models.npz into a model,
    and `load_oracle.arrays` is that file."""
    arrays = np.load(Path(__file__).parents[1] / "oracles" / "image_models.npz")

    def load(model, case):
        kinds = nnx.Any(nnx.Param, nnx.BatchStat)
        flat = {
            "/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model, kinds))
        }
        weights = arrays[f"{case}/weights"].astype(np.float32) / 32
        sizes = [flat[path].size for path in sorted(flat)]
        assert sum(sizes) == weights.size
        for path, values in zip(sorted(flat), np.split(weights, np.cumsum(sizes)[:-1])):
            flat[path][...] = jnp.asarray(values.reshape(flat[path].shape))
        return model

    load.arrays = arrays
    return load


@pytest.fixture(scope="session")
def check_oracle(make_model, load_oracle, quick_jit):
    """`check_oracle(config, case, names)`: logits and the images' gradients are the oracle's."""

    def check(config, case, names=("evaluation",)):
        graphdef, state = nnx.split(load_oracle(make_model(config), case))
        arrays = load_oracle.arrays
        images = arrays["images"].astype(np.float32) / 8

        def run(state, images, name):
            model = nnx.merge(graphdef, state)
            model.set_attributes(use_running_average=name == "evaluation", raise_if_not_found=False)
            return model(images)

        @partial(quick_jit, static_argnames="name")
        def value_and_slope(state, images, name):
            logits, vjp = jax.vjp(partial(run, name=name), state, images)
            return logits, vjp(arrays["cotangent"])[1][:, ::2, ::2]

        for name in names:
            logits, slope = value_and_slope(state, images, name)
            np.testing.assert_allclose(logits, arrays[f"{case}/{name}/logits"], atol=2e-5)
            expected = arrays[f"{case}/{name}/slope"]
            tolerance = 1e-4 * np.abs(expected).max()
            np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=tolerance)

    return check


@pytest.fixture(scope="session")
def count_parameters():
    """`count_parameters(build)`, without making any of them."""

    def count(build):
        model = nnx.eval_shape(build)
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    return count
