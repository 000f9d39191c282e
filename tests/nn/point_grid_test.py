from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.nn import PointGridBlock
from jaxref.norms import layer_norm

RELEASE = np.load(Path(__file__).parents[1] / "oracles" / "gridformer.npz")
GRIDS = {"planes": ((0, 1), (0, 2), (1, 2)), "volume": ((0, 1, 2),)}


def release_block(case):
    """The block with the parameters of the authors' layer, and the inputs that it was given."""
    block = PointGridBlock(3, 4, grids=GRIDS[case], share_groups=2, rngs=nnx.Rngs(0))
    parameters = nnx.to_flat_state(nnx.state(block, nnx.Param))
    flat, start = RELEASE[f"{case}_parameters"], 0
    for _, parameter in sorted(parameters, key=lambda item: ".".join(map(str, item[0]))):
        size = parameter.size
        parameter[...] = flat[start : start + size].reshape(parameter.shape)
        start += size
    assert start == flat.size
    nnx.update(block, nnx.from_flat_state(parameters))
    return block, *(RELEASE[f"{case}_{name}"] for name in ("features", "grids", "positions"))


@pytest.mark.parametrize("case", GRIDS)
def test_values_and_gradients_match_the_release(case):
    block, features, grids, positions = release_block(case)

    @nnx.jit
    def run(block, features, grids):
        def loss(block, features, grids):
            new_features, new_grids = block(features, list(grids), positions)
            squares = jnp.sum(new_features**2) + sum(jnp.sum(grid**2) for grid in new_grids)
            return squares / 2, (new_features, jnp.stack(new_grids))

        return nnx.grad(loss, argnums=(0, 1, 2), has_aux=True)(block, features, grids)

    (by_parameter, *gradients), outputs = run(block, features, grids)
    ours = dict(zip(("new_features", "new_grids"), outputs))
    ours |= dict(zip(("grad_features", "grad_grids"), gradients))
    ours["grad_weight"] = by_parameter["weight"]["kernel"][...]
    ours["grad_position"] = by_parameter["position"][0]["kernel"][...]
    for name, value in ours.items():
        expected = RELEASE[f"{case}_{name}"]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(value / scale, expected / scale, atol=2e-5, err_msg=name)


def test_statistics_advance_in_training_only_and_over_all_points():
    block, features, grids, positions = release_block("planes")
    initial = block.weight_norm.running_state()
    run = nnx.jit(lambda block, *a: block(*a))
    block.eval()
    order = np.random.default_rng(0).permutation(24)
    expected, planes = run(block, features, list(grids), positions)
    ours, same_planes = run(block, features[:, order], list(grids), positions[:, order])
    np.testing.assert_allclose(ours, expected[:, order], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(same_planes, planes, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(block.weight_norm.running_state(), initial)
    other = np.concatenate([features[:1], 3 * features[1:]])
    alone = run(block, other, list(grids), positions)[0]
    np.testing.assert_allclose(alone[0], expected[0], rtol=1e-4, atol=1e-4)
    block.train()
    run(block, features, list(grids), positions)
    assert np.any(block.weight_norm.running_state().mean != initial.mean)
    assert np.any(block.position[1].running_state().mean != 0)


def test_layer_norm_one_plane_and_types():
    block = PointGridBlock(
        3,
        16,
        grids=((0, 2),),
        norm=layer_norm,
        position_norm=layer_norm,
        dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )
    assert not jax.tree.leaves(nnx.state(block, nnx.BatchStat))
    features = np.random.default_rng(0).normal(size=(1, 5, 3)).astype(np.float32)
    positions = np.random.default_rng(1).random((1, 5, 3)).astype(np.float32)
    plane = jnp.zeros((1, 4, 4, 16), jnp.bfloat16)

    @nnx.jit
    def run(block, positions):
        loss = lambda block: jnp.sum(block(features, [plane], positions)[0] ** 2)
        return block(features, [plane], positions), nnx.grad(loss)(block)

    (new_features, (new_plane,)), gradients = run(block, positions)
    assert new_features.dtype == new_plane.dtype == jnp.bfloat16
    assert (new_features.shape, new_plane.shape) == ((1, 5, 16), (1, 4, 4, 16))
    moved = positions + np.array([0, 0.3, 0], np.float32)  # along the coordinate it does not see
    np.testing.assert_array_equal(run(block, moved)[0][0], new_features)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.all(np.isfinite(gradient[...])), path


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="out_features must be a multiple of share_groups = 8"):
        PointGridBlock(3, 12, rngs=nnx.Rngs(0))
    for grids in ((), ((0, 1), (0, 1, 2)), ((),)):
        with pytest.raises(ValueError, match="grids must have the same number of axes"):
            PointGridBlock(3, 8, grids=grids, rngs=nnx.Rngs(0))
    block = PointGridBlock(3, 8, grids=((0, 2),), rngs=nnx.Rngs(0))
    features, plane, positions = jnp.ones((1, 5, 3)), jnp.ones((1, 4, 4, 8)), jnp.ones((1, 5, 3))
    with pytest.raises(ValueError, match="grids must be 1 arrays, got 2"):
        block(features, [plane, plane], positions)
    with pytest.raises(ValueError, match="at least 3 coordinates"):
        block(features, [plane], positions[..., :2])
    with pytest.raises(ValueError, match=r"grids\[0\] must have shape \(1, 4, 4, 8\)"):
        block(features, [plane[:, :, :3]], positions)
