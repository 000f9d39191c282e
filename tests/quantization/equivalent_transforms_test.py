import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.models.transformer import TransformerConfig
from jaxref.quantization import (
    EquivalentTransform,
    TransformSite,
    apply_equivalent_transforms,
    equivalent_transforms_init,
    fold_norm_gains,
    hadamard_matrix,
    transformer_sites,
)

SIZES = {
    "features": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "mlp_features": 24,
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 20, size=(2, 3, 8)))


def model(num_layers=2, rotary=True, gated=True):
    config = TransformerConfig(
        vocab_size=20,
        max_length=8,
        num_layers=num_layers,
        gated=gated,
        activation=jax.nn.silu,
        positions="rotary" if rotary else None,
        **SIZES,
    )
    graph, state = nnx.split(config.build(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(3)  # gains that are not 1
    params = jax.tree.map(
        lambda x: x * rng.uniform(0.5, 2.0, x.shape).astype(np.float32) if x.ndim == 1 else x,
        nnx.to_pure_dict(state),
    )

    def apply_fn(params, tokens):
        given = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(given, params)
        return nnx.merge(graph, given)(tokens)

    return apply_fn, params


def random_transforms(params, sites, seed=0):
    rng = np.random.default_rng(seed)
    transforms = {}
    for name, transform in equivalent_transforms_init(params, sites).items():
        rotation, log_scale = transform
        if rotation is not None and sites[name].rotation == "learned":
            rotation = jnp.asarray(np.linalg.qr(rng.normal(size=rotation.shape))[0], jnp.float32)
        if log_scale is not None:
            log_scale = jnp.asarray(rng.normal(size=log_scale.shape), jnp.float32)
        transforms[name] = EquivalentTransform(rotation, log_scale)
    return transforms


class TestEquivalentTransforms:
    @pytest.mark.parametrize(("rotary", "gated"), [(True, True), (False, False)])
    def test_any_transform_leaves_a_transformer_unchanged(self, rotary, gated):
        layers = 2 if gated else 1
        apply_fn, params = model(layers, rotary, gated)
        sites = transformer_sites(layers, rotary=rotary, gated=gated, **SIZES)
        folded = fold_norm_gains(params, sites)
        for name in ("blocks/0/mlp/input_norm", "final_norm"):
            *path, last = name.split("/")
            gain = folded
            for key in (*path, last):
                gain = gain[int(key) if key.isdigit() else key]
            np.testing.assert_array_equal(gain["scale"], 1.0)
        changed = apply_equivalent_transforms(folded, random_transforms(folded, sites), sites)
        jax.tree.map(
            lambda x, y: chex.assert_trees_all_equal_shapes_and_dtypes(x, y), params, changed
        )
        apply_fn = jax.jit(apply_fn)
        expected = apply_fn(params, TOKENS[0])
        assert np.abs(expected).max() > 0.3
        np.testing.assert_allclose(apply_fn(folded, TOKENS[0]), expected, atol=1e-4)
        np.testing.assert_allclose(apply_fn(changed, TOKENS[0]), expected, atol=1e-4)
        for kernel in ("query", "key", "value", "output"):
            path = lambda p: p["blocks"][layers - 1]["attention"]["function"][kernel]["kernel"]
            assert np.abs(path(changed) - path(params)).max() > 0.05
        if rotary:  # scales that do not commute with the rotation of a pair do not cancel
            free = {name: dataclasses.replace(site, tied=1) for name, site in sites.items()}
            broken = apply_equivalent_transforms(folded, random_transforms(folded, free), free)
            assert np.abs(apply_fn(broken, TOKENS[0]) - expected).max() > 1e-2

    def test_online_hadamard_is_left_to_the_network(self):
        _, params = model(num_layers=1)
        sites = transformer_sites(1, online_hadamard=True, **SIZES)
        transforms = equivalent_transforms_init(params, sites)
        only = {"0/hidden_hadamard": sites["0/hidden_hadamard"]}
        changed = apply_equivalent_transforms(params, transforms, only)
        down = lambda p: p["blocks"][0]["mlp"]["function"]["down"]["kernel"]
        np.testing.assert_allclose(hadamard_matrix(24) @ down(changed), down(params), atol=1e-6)

    def test_bad_input(self):
        params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 3))}
        site = TransformSite(features=4, writers=("up",), readers=("down",), scaling=True)
        start = equivalent_transforms_init(params, {"x": site})
        with pytest.raises(ValueError, match="transforms must have one for the site 'x'"):
            apply_equivalent_transforms(params, {}, {"x": site})
        with pytest.raises(ValueError, match="params must have the writer 'in'"):
            apply_equivalent_transforms(
                params, start, {"x": dataclasses.replace(site, writers=("in",))}
            )
        with pytest.raises(ValueError, match=r"reader 'up' must have 4 features, got \(3, 4\)"):
            apply_equivalent_transforms(
                params, start, {"x": dataclasses.replace(site, readers=("up",))}
            )
        with pytest.raises(ValueError, match="a multiple of 2 heads and 4 features"):
            equivalent_transforms_init(
                params, {"x": dataclasses.replace(site, heads=2, rotation="learned")}
            )
        with pytest.raises(ValueError, match=r"transforms\['x'\].log_scale must have shape"):
            apply_equivalent_transforms(
                params, {"x": EquivalentTransform(None, jnp.ones(3))}, {"x": site}
            )
        with pytest.raises(ValueError, match="rotation must be one of"):
            dataclasses.replace(site, rotation="random")
        with pytest.raises(ValueError, match="must not be rotated"):
            TransformSite(features=4, gain="g", rotation="learned")
        with pytest.raises(ValueError, match="tied must divide features = 4, got 3"):
            dataclasses.replace(site, tied=3)
        with pytest.raises(ValueError, match="must have readers to learn a rotation from"):
            equivalent_transforms_init(
                params, {"x": dataclasses.replace(site, readers=(), rotation="learned")}
            )
