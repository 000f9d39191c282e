from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.attention import dot_product_attention, harmonic_alibi_bias, rotary_embedding
from jaxref.nn import MultiHeadAttention
from jaxref.norms import layer_norm, rms_norm
from jaxref.parallel import make_mesh, use_rules

CAUSAL = np.tril(np.ones((1, 1, 5, 5), bool))


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(features=8, num_heads=4, **kwargs):
    return MultiHeadAttention(features, num_heads, rngs=nnx.Rngs(0), **kwargs)


def flax_twin(ours, *, use_norm=False):
    """flax's module with the same weights; grouped key and value heads written out."""
    features, heads, head_dim = ours.query.kernel.shape
    theirs = nnx.MultiHeadAttention(
        num_heads=heads,
        in_features=features,
        qkv_features=heads * head_dim,
        use_bias=False,
        normalize_qk=use_norm,
        decode=False,
        rngs=nnx.Rngs(1),
    )
    group = heads // ours.key.kernel.shape[1]
    theirs.query.kernel[...] = ours.query.kernel[...]
    theirs.key.kernel[...] = jnp.repeat(ours.key.kernel[...], group, axis=1)
    theirs.value.kernel[...] = jnp.repeat(ours.value.kernel[...], group, axis=1)
    theirs.out.kernel[...] = ours.output.kernel[...]
    if use_norm:
        theirs.query_ln.scale[...] = ours.query_norm.scale[...]
        theirs.key_ln.scale[...] = ours.key_norm.scale[...]
    return theirs


MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "mask": ("random", False),
    "both": ("random", True),
}


class TestAgainstFlax:
    @pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
    @pytest.mark.parametrize("masking", MASKS)
    def test_values_and_gradients(self, num_kv_heads, masking):
        ours = build(num_kv_heads=num_kv_heads, head_dim=3)
        theirs = flax_twin(ours)
        mask, is_causal = MASKS[masking]
        if mask is not None:
            mask = (random((2, 1, 5, 5), 1) > 0) | np.eye(5, dtype=bool)
        both = mask if not is_causal else CAUSAL if mask is None else mask & CAUSAL
        x, cotangent = random((2, 5, 8)), random((2, 5, 8), 2)

        def our_loss(module, x):
            return jnp.sum(module(x, mask=mask, is_causal=is_causal) * cotangent)

        def their_loss(module, x):
            return jnp.sum(module(x, mask=both) * cotangent)

        np.testing.assert_allclose(
            ours(x, mask=mask, is_causal=is_causal), theirs(x, mask=both), atol=1e-5
        )
        grads, grad_x = nnx.grad(our_loss, argnums=(0, 1))(ours, x)
        expected, expected_x = nnx.grad(their_loss, argnums=(0, 1))(theirs, x)
        np.testing.assert_allclose(grad_x, expected_x, atol=2e-5)
        kv_heads = ours.key.kernel.shape[1]
        for name, theirs_name in (
            ("query", "query"),
            ("key", "key"),
            ("value", "value"),
            ("output", "out"),
        ):
            gradient, wanted = grads[name].kernel[...], expected[theirs_name].kernel[...]
            if name in ("key", "value"):  # a shared head gathers from its group
                wanted = wanted.reshape(8, kv_heads, -1, 3).sum(axis=2)
            np.testing.assert_allclose(gradient, wanted, atol=2e-5, err_msg=name)

    def test_query_key_norm(self):
        ours = build(head_dim=6, query_key_norm=partial(layer_norm, bias=None))
        ours.query_norm.scale[...] = random(6, 1)
        ours.key_norm.scale[...] = random(6, 2)
        theirs = flax_twin(ours, use_norm=True)
        x = random((2, 5, 8))
        np.testing.assert_allclose(
            ours(x, is_causal=True), theirs(x, mask=CAUSAL), rtol=1e-5, atol=1e-5
        )


class TestProperties:
    @pytest.mark.parametrize("num_kv_heads", [None, 2])
    @pytest.mark.parametrize("query_key_norm", [None, rms_norm])
    @pytest.mark.parametrize("rotary_base", [None, 100.0])
    def test_a_later_token_changes_no_earlier_output(
        self, num_kv_heads, query_key_norm, rotary_base
    ):
        attend = build(
            num_kv_heads=num_kv_heads, query_key_norm=query_key_norm, rotary_base=rotary_base
        )
        x = random((2, 5, 8))
        changed = x.copy()
        changed[:, 3] += 1
        before, after = attend(x, is_causal=True), attend(changed, is_causal=True)
        np.testing.assert_array_equal(before[:, :3], after[:, :3])
        assert np.all(np.any(before[:, 3:] != after[:, 3:], axis=-1))
        assert np.all(np.any(attend(x) != attend(changed), axis=-1))

    def test_query_key_norm_ignores_the_size_of_its_projections(self):
        attend = build(query_key_norm=partial(rms_norm, epsilon=0.0))
        x = random((2, 5, 8))
        before = attend(x)
        attend.query.kernel[...] *= 100.0
        attend.key.kernel[...] *= 0.01
        np.testing.assert_allclose(attend(x), before, atol=1e-5)
        assert attend.query_norm.scale.shape == attend.key_norm.scale.shape == (2,)

    def test_rotary_makes_order_matter_by_distance_alone(self):
        plain, rotary = build(head_dim=4), build(head_dim=4, rotary_base=100.0)
        x = random((1, 5, 8))
        turned = np.ascontiguousarray(x[:, ::-1])
        np.testing.assert_allclose(plain(turned)[:, ::-1], plain(x), atol=1e-5)
        assert np.abs(rotary(turned)[:, ::-1] - rotary(x)).max() > 1e-3
        # Behind tokens that the mask hides, all positions are later: nothing changes.
        padded = np.concatenate([random((1, 3, 8), 1), x], axis=1)
        mask = (np.arange(8) >= 3)[None, None, None]
        np.testing.assert_allclose(rotary(padded, mask=mask)[:, 3:], rotary(x), atol=1e-5)

    def test_normalises_before_it_rotates(self):
        seen = {}

        def spy(query, key, value, *, mask, is_causal):
            seen.update(query=query, key=key, mask=mask, is_causal=is_causal)
            return value

        attend = build(head_dim=4, attention=spy, query_key_norm=rms_norm, rotary_base=100.0)
        attend.query_norm.scale[...] = jnp.array([2.0, 0.5, 1.0, -1.0])
        x, mask = random((2, 5, 8)), jnp.ones((1, 1, 5, 5), bool)
        attend(x, mask=mask, is_causal=True)
        for name, norm in (("query", attend.query_norm), ("key", attend.key_norm)):
            heads = jnp.einsum("bti,ihd->bthd", x, getattr(attend, name).kernel[...])
            expected = rotary_embedding(rms_norm(heads, norm.scale[...]), base=100.0)
            np.testing.assert_allclose(seen[name], expected, atol=1e-5)
        assert seen["mask"] is mask
        assert seen["is_causal"] is True


class TestParameters:
    def test_shapes_and_names(self):
        attend = build(num_kv_heads=2, head_dim=6, query_key_norm=layer_norm)
        axes = {
            "/".join(map(str, path)): (leaf.shape, leaf.get_metadata()["axes"])
            for path, leaf in nnx.to_flat_state(nnx.state(attend))
        }
        assert axes == {
            "query/kernel": ((8, 4, 6), ("embed", "heads", None)),
            "key/kernel": ((8, 2, 6), ("embed", "kv_heads", None)),
            "value/kernel": ((8, 2, 6), ("embed", "kv_heads", None)),
            "output/kernel": ((4, 6, 8), ("heads", None, "embed")),
            "query_norm/scale": ((6,), (None,)),
            "query_norm/bias": ((6,), (None,)),
            "key_norm/scale": ((6,), (None,)),
            "key_norm/bias": ((6,), (None,)),
        }

    def test_initializers(self):
        ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
        attend = build(kernel_init=ones, output_init=zeros)
        for linear in (attend.query, attend.key, attend.value):
            assert (linear.kernel[...] == 1).all()
        assert (attend.output.kernel[...] == 0).all()
        assert (build(kernel_init=ones).output.kernel[...] == 1).all()

    def test_half_precision(self):
        kwargs = {"query_key_norm": rms_norm, "rotary_base": 100.0}
        half, full = build(dtype=jnp.bfloat16, **kwargs), build(**kwargs)
        x = random((2, 5, 8))
        ours = half(x, is_causal=True)
        assert ours.dtype == jnp.bfloat16
        chex.assert_trees_all_equal_dtypes(nnx.state(half), nnx.state(full))
        np.testing.assert_allclose(np.float32(ours), full(x, is_causal=True), atol=0.05)

    @pytest.mark.parametrize(
        ("args", "kwargs", "message"),
        [
            ((8, 3), {}, "num_heads must divide features = 8 .* got 3"),
            ((8, 4), {"num_kv_heads": 3}, "num_kv_heads must divide num_heads = 4, got 3"),
            ((8, 4), {"num_kv_heads": 8}, "num_kv_heads must divide num_heads = 4, got 8"),
            ((8, 4), {"num_kv_heads": 0}, "num_kv_heads must be in"),
            ((8, 0), {}, "num_heads must be in"),
        ],
    )
    def test_heads_that_do_not_divide_raise(self, args, kwargs, message):
        with pytest.raises(ValueError, match=message):
            build(*args, **kwargs)
        assert build(8, 3, head_dim=4)(random((1, 2, 8))).shape == (1, 2, 8)

    def test_odd_heads_cannot_be_rotated(self):
        with pytest.raises(ValueError, match="even head_dim"):
            build(9, 3, rotary_base=100.0)(random((1, 2, 9)))


class TestOverAContext:
    def test_keys_and_values_come_from_the_context(self):
        attend = build(num_kv_heads=2)
        x, context = random((2, 3, 8)), random((2, 5, 8), seed=1)
        mask = np.arange(5) < np.array([[[[3]]], [[[5]]]])
        memory = attend.remember(context)
        expected = attend.output(
            dot_product_attention(
                attend.query(x), attend.key(context), attend.value(context), mask=mask
            )
        )
        np.testing.assert_allclose(attend(x, context=context, mask=mask), expected, rtol=1e-5)
        np.testing.assert_allclose(attend.recall(x, memory, mask=mask), expected, rtol=1e-5)


class TestPositions:
    def test_a_share_of_each_head_is_rotated(self):
        attend = build(head_dim=8, rotary_base=100.0, rotary_fraction=0.5)
        x = random((1, 4, 8))
        key, _ = attend.remember(x)
        plain = attend.key(x)
        np.testing.assert_array_equal(key[..., 4:], plain[..., 4:])
        np.testing.assert_allclose(
            key[..., :4], rotary_embedding(plain[..., :4], base=100.0), rtol=1e-5, atol=1e-6
        )

    def test_a_bias_by_position(self):
        bias = partial(harmonic_alibi_bias, slopes="geometric", distance="linear")
        attend, x = build(position_bias=bias), random((1, 5, 8))
        expected = attend.output(
            dot_product_attention(
                attend.query(x),
                attend.key(x),
                attend.value(x),
                bias=bias(4, 5, 5),
                is_causal=True,
            )
        )
        np.testing.assert_allclose(attend(x, is_causal=True), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "options", "called"),
    [
        ({"data": 2, "tensor": 4}, {"num_kv_heads": 4}, ("is_causal",)),
        ({"data": 2, "tensor": 4}, {}, ("mask",)),
        ({"data": 4, "tensor": 2}, {"position_bias": harmonic_alibi_bias}, ("is_causal",)),
        ({"data": 2, "sequence": 4}, {"rotary_base": 10.0}, ("is_causal",)),
        ({"sequence": 4, "tensor": 2}, {}, ("context",)),
    ],
)
def test_on_a_mesh_it_is_the_attention_of_one_device(sizes, options, called):
    mesh, attend = make_mesh(sizes), build(16, 8, **options)
    x = random((4, 16, 16))
    given = {
        "is_causal": True,
        "mask": random((4, 1, 16, 16), 1) < 0.5,
        "context": random((4, 16, 16), 2),
    }
    alone = partial(attend, **{name: given[name] for name in called})

    def on_mesh(x):
        with use_rules(mesh):
            return alone(x)

    def gradient(function):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(function(x)))))(x)

    np.testing.assert_allclose(jax.jit(on_mesh)(x), alone(x), atol=2e-6)
    np.testing.assert_allclose(gradient(on_mesh), gradient(alone), atol=1e-5)
